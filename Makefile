SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.PHONY: audit

# Known vulnerabilities of what uv.lock installs for users. Asks the package index, and fails where it cannot: not in CI.
audit:
	uv export --quiet --no-dev --all-extras --no-emit-project --format requirements-txt \
		| uvx --quiet 'pip-audit>=2.9,<3' --strict --disable-pip --progress-spinner off --requirement /dev/stdin

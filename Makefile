SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.PHONY: checks audit

# What CI runs.
checks:
	.ci/run

# Known vulnerabilities of what uv.lock installs for users. Asks pypi.org, and fails where it cannot: not a part of CI.
audit:
	uv export --quiet --no-dev --all-extras --no-emit-project --format requirements-txt \
		| uvx --quiet 'pip-audit>=2.9,<3' --strict --disable-pip --progress-spinner off --requirement /dev/stdin

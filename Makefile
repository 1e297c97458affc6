SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.PHONY: audit gpu

# Known vulnerabilities of what uv.lock installs for users. Asks the package index, and fails where it cannot: not in CI.
audit:
	uv export --quiet --no-dev --all-extras --no-emit-project --format requirements-txt \
		| uvx --quiet 'pip-audit>=2.9,<3' --strict --disable-pip --progress-spinner off --requirement /dev/stdin

# Prove a GPU and measure what docs/performance.md lacks, in ten minutes. Call it again to go on.
gpu:
	python benchmarks/first_gpu.py

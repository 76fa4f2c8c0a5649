# Everything here does its own set-up, from a bare Debian 12 on. `make help` lists the targets.
#
# Two environments: .venv runs the gateway and its tests. .venv-check runs ruff and mypy, and has no
# trio-typing in it, because the trio-stubs that come with that would hide trio's own types from mypy.
# PYTHON=/path/to/python3.12 make ... picks the interpreter for both.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11

# Sets $python to the first of $(PYTHON) that is new enough, or to nothing.
define pick_python
python=
for candidate in $(PYTHON); do
	if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		python=$$(type -P "$$candidate")
		break
	fi
done
endef

# $(call pip_install,REQUIREMENT...): into the environment whose stamp is being made.
define pip_install
echo "==> $(@D): pip install $(1)"
$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(1) || {
	echo "make: pip could not install the above; its own words are over this line." >&2
	exit 1
}
touch $@
endef

.PHONY: help demo test check bench bench-quick bench-idle bench-memory bench-layers interop-matrix soak fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/.installed ## write and read a disk through the gateway, over TLS, in one process
	@echo "==> nbd-gateway demo --self-test"
	.venv/bin/nbd-gateway demo --self-test

TEST_JOBS ?= 2
test: check .venv/.test-installed ## everything: check, 100 % branches of gateway/nbd, all other tests
	@tests/peers/install
	echo "==> coverage of gateway/nbd by tests/nbd alone"
	.venv/bin/coverage run -m pytest -q tests/nbd
	.venv/bin/coverage report
	echo "==> all other tests"
	.venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal --ignore tests/nbd

check: .venv-check/.installed ## formatting, lint and types; changes nothing
	@echo "==> ruff format --check, ruff check, mypy --strict gateway"
	.venv-check/bin/ruff format --check --quiet .
	.venv-check/bin/ruff check --quiet .
	.venv-check/bin/mypy --strict gateway

bench: .venv/.bench-installed ## the gateway beside nbdkit and qemu-nbd: tables, JSON and plots, in 25 minutes
	@tests/peers/install
	.venv/bin/python -m tests.bench

bench-quick: .venv/.installed ## a few cases beside nbdkit, as ratios, in two minutes
	@tests/peers/install
	.venv/bin/python -m tests.bench --quick

bench-idle: .venv/.installed ## what 10 000 idle clients cost, in five minutes
	@tests/peers/install
	@mkdir -p build
	.venv/bin/python -m tests.bench.idle --json build/idle.json

bench-memory: .venv/.installed ## what greedy clients make the gateway hold, beside README's formula, in two minutes
	@.venv/bin/python -m tests.bench.memory

bench-layers: .venv/.installed ## what each layer of the data plane costs, in two minutes
	@.venv/bin/python -m tests.bench.layers

interop-matrix: .venv/.test-installed ## every client in front of every server; the table in README.md
	@tests/peers/install
	.venv/bin/python -m tests.interop.matrix

SOAK_SECONDS ?= 3600
soak: .venv/.test-installed ## real clients, kills, restarts, reloads, for SOAK_SECONDS (3600); all data verified
	@tests/peers/install
	@mkdir -p build
	.venv/bin/python -m tests.soak --seconds $(SOAK_SECONDS) --json build/soak.json

FUZZ_SECONDS ?= 3600
FUZZ_JOBS ?= 2
fuzz: .venv/.test-installed ## coverage-guided inputs for all that is parsed, for FUZZ_SECONDS (3600), on FUZZ_JOBS cores (2)
	@mkdir -p build
	.venv/bin/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) --json build/fuzz.json

clean: ## remove the environments and everything that tools left behind
	@rm -rf .venv .venv-check .coverage .coverage.* htmlcov build dist
	find . -name .git -prune -o \( -name __pycache__ -o -name .hypothesis -o -name '.*_cache' \) \
		-type d -prune -exec rm -rf {} +

.venv/.made .venv-check/.made:
	@$(pick_python)
	if [ "$(origin PYTHON)" = file ] && ! "$${python:-false}" -c 'import ensurepip' 2>/dev/null; then
		if ! type -P apt-get >/dev/null; then
			echo "make: Python 3.11 or newer with its venv module is needed; set PYTHON=..." >&2
			exit 1
		fi
		echo "==> apt-get install python3-venv"
		as_root=
		[ "$$(id -u)" = 0 ] || as_root=sudo
		log=$$($$as_root apt-get -q update 2>&1 && $$as_root env DEBIAN_FRONTEND=noninteractive \
			apt-get -q install -y --no-install-recommends python3-venv 2>&1) || {
			printf '%s\n' "$$log" "make: apt-get could not install python3-venv (see above)." >&2
			exit 1
		}
		$(pick_python)
	fi
	if [ -z "$$python" ]; then
		echo "make: none of these is Python 3.11 or newer: $(PYTHON)" >&2
		exit 1
	fi
	echo "==> $(@D): $$("$$python" -V), $$python"
	"$$python" -m venv --clear $(@D)
	touch $@

.venv/.installed: .venv/.made pyproject.toml
	@$(call pip_install,-e .)

.venv/.test-installed: .venv/.installed
	@$(call pip_install,-e '.[dev$(,)typing-compat]')

.venv/.bench-installed: .venv/.installed
	@$(call pip_install,-e '.[bench]')

.venv-check/.installed: .venv-check/.made pyproject.toml
	@$(call pip_install,-e '.[dev]')

, := ,

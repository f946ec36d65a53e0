# Everything a newcomer needs: `make run` and `make test` work on a fresh Debian 12, as root, from a fresh clone.
# Each step leaves a stamp in .stamps and is skipped while nothing it depends on has changed.

.DELETE_ON_ERROR:
.PHONY: help run test guest bench lint unit boot setup clean

PYTHON := .venv/bin/python
MICROVM := .venv/bin/microvm
BASE_TOOLS := python3-venv gcc libc6-dev musl-tools mmdebstrap erofs-utils uidmap busybox-static xz-utils zstd cpio
GUEST_TOOLS := linux-source-6.1 make flex bison bc libelf-dev libssl-dev
TEST_TOOLS := qemu-system-x86 binutils

HELLO := import platform, sys; \
	print("Hello from Python", platform.python_version(), "on Linux", platform.release(), "inside a microVM"); \
	print("2**64 =", 2**64)

help:
	@echo "make run     set up everything and run a Python program in a microVM"
	@echo "make test    set up everything and run every test"
	@echo "make guest   build the tuned kernel (minutes, once)"
	@echo "make bench   measure, side by side with QEMU"
	@echo "make lint    style, types for three systems, layers"
	@echo "make clean   remove what make made here (kernels and images stay in the cache)"

# The kernel and the image are fetched side by side: together they are most of the first run.
run: .stamps/python
	@$(MAKE) --no-print-directory -j2 .stamps/kernel .stamps/image
	@echo "==> microvm run -- python3 -c ..."
	@$(MICROVM) run -- python3 -c '$(HELLO)'

setup: .stamps/dev .stamps/kernel .stamps/image

test: .stamps/dev .stamps/test-tools .stamps/image .stamps/debian-kernels guest lint
	@MICROVM_REQUIRE=soft MICROVM_REQUIRE_GUESTS=tuned,cloud,generic,python,gcc $(PYTHON) -m pytest -q --durations=10

# The quick part of the tests, for every change.
unit: .stamps/dev
	@$(PYTHON) -m pytest -q tests/unit tests/property tests/abi tests/api tests/cli

boot: .stamps/dev .stamps/image
	@$(PYTHON) -m pytest tests/boot

lint: .stamps/dev
	@echo "==> ruff, mypy (linux, win32, darwin), import-linter"
	@.venv/bin/ruff check src tests
	@.venv/bin/ruff format --check src tests
	@for system in linux win32 darwin; do .venv/bin/mypy --platform $$system || exit 1; done
	@.venv/bin/lint-imports --no-cache

guest: .stamps/dev .stamps/guest-tools
	@echo "==> the tuned kernel (minutes the first time, then it is in the cache)"
	@$(MICROVM) kernel build

bench: .stamps/dev .stamps/test-tools .stamps/image guest
	@$(PYTHON) -m bench

clean:
	rm -rf .stamps .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,PACKAGES): install what is missing; say so instead where that is not possible.
define install
	@missing=$$(for package in $(1); do \
	    dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || printf '%s ' $$package; done); \
	if [ -n "$$missing" ]; then \
	    echo "==> installing $$missing"; \
	    if [ "$$(id -u)" != 0 ]; then echo "run as root: apt-get install $$missing" >&2; exit 1; fi; \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
endef

.stamps:
	@mkdir -p $@

.stamps/tools: Makefile | .stamps
	$(call install,$(BASE_TOOLS))
	@touch $@

.stamps/guest-tools: Makefile | .stamps/tools
	$(call install,$(GUEST_TOOLS))
	@touch $@

.stamps/test-tools: Makefile | .stamps/tools
	$(call install,$(TEST_TOOLS))
	@touch $@

NATIVE := $(wildcard setup.py src/microvm/agent/guest/*.[ch] src/microvm/hypervisor/soft/shim/*)

.stamps/python: pyproject.toml $(NATIVE) | .stamps/tools
	@echo "==> Python environment in .venv"
	@test -x $(PYTHON) || python3 -m venv .venv
	@$(PYTHON) -m pip install -q --disable-pip-version-check -e '.[soft]'
	@touch $@

.stamps/dev: .stamps/python
	@echo "==> development tools"
	@$(PYTHON) -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"]))' \
	    >.stamps/requirements
	@$(PYTHON) -m pip install -q --disable-pip-version-check -r .stamps/requirements
	@touch $@

# `default` fails where no kernel is in the cache; any one will do.
.stamps/kernel: .stamps/python
	@echo "==> a kernel"
	@$(PYTHON) -c 'from microvm.images import kernels; kernels.default()' 2>/dev/null || $(MICROVM) kernel fetch cloud
	@touch $@

# The tests boot what Debian ships, too.
.stamps/debian-kernels: .stamps/python
	@echo "==> Debian's cloud and generic kernels"
	@$(MICROVM) kernel fetch cloud
	@$(MICROVM) kernel fetch generic
	@touch $@

.stamps/image: .stamps/python
	@echo "==> the python image"
	@$(MICROVM) image build python
	@touch $@

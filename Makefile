# Build, test, fuzz and measure. resources/install-tools installs what the build and the tests need.

CARGO ?= cargo
# The tests' guest is a workspace of its own: it is built without std.
GUEST := tests/guest
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)

.DEFAULT_GOAL := help
.PHONY: help build demo demo-build demo-tools test stress costs lab-qemu bench bench-quick bench-build fuzz lint clean

help: ## Lists these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

build: ## Builds the program, target/release/minivmm
	@resources/install-tools --build
	$(CARGO) build --release --bin minivmm

demo: ## Two guests and a third host on one wire, pings between them, and a command in a guest (needs root)
	@echo "Building minivmm and the demo, fetching what they need ..."
	@resources/install-tools --build
	@$(MAKE) --no-print-directory -j2 demo-build demo-tools
	@MINIVMM_BIN=$(TARGET)/debug/minivmm $(TARGET)/debug/examples/demo </dev/null

demo-build:
	@$(CARGO) build -q -p vmm --bin minivmm --example demo

# Without hardware virtualisation the demo runs in the lab, which is QEMU.
demo-tools:
	@resources/install-tools $$(grep -qwE 'vmx|svm' /proc/cpuinfo && [ -w /dev/kvm ] || echo qemu-system-x86_64)

SUITES ?=
test: ## Runs all tests, or SUITES="vmm.pci net.watch" (as root, for network namespaces)
	resources/install-tools debootstrap dmsetup git iasl mke2fs nft passt pip3 qemu-system-x86_64 qemu-img sfdisk socat \
		ssh strace tcc tshark xz zstd /usr/share/OVMF/OVMF_CODE_4M.fd
	tests/run $(SUITES)

STRESS ?= --runs 1000
stress: ## minivmm run 1,000 times, each kind of end, SIGKILL at any moment; nothing may be left (as root; STRESS="--runs 30 --jobs 30")
	resources/install-tools passt qemu-system-x86_64
	$(CARGO) build -q -p vmm --bin minivmm --example stress
	MINIVMM_BIN=$(TARGET)/debug/minivmm $(TARGET)/debug/examples/stress $(STRESS) </dev/null

costs: ## Makes what a guest costs now the baseline that tests compare with (tests/costs.json)
	resources/install-tools strace
	MINIVMM_COSTS=write $(CARGO) test -q -p vmm --test costs

lab-qemu: ## Builds the QEMU that the lab prefers, once: no guest hangs in it (some minutes; as root)
	@resources/install-tools qemu-system-x86_64
	@resources/lab-qemu

# Without hardware virtualisation Linux guests run in the lab, where their times mean little.
BENCH_ROUNDS ?= 1
BENCH_OUT ?= $(TARGET)/bench
export BENCH_BASE
BENCH = MINIVMM_BIN=$(TARGET)/release/minivmm MINIVMM_GUEST=$(TARGET)/guest/release/guest \
	$(TARGET)/release/examples/bench --json $(BENCH_OUT).json --svg $(BENCH_OUT).svg

bench: bench-build ## minivmm beside QEMU and the bare macvtap: tables, JSON, a chart (20 minutes, as root)
	@$(BENCH) native share user-net vsock start density run linux $(BENCH_ROUNDS) linux run 1 </dev/null

bench-quick: bench-build ## What needs no Linux guest, and is worth most of it (3 minutes, as root)
	@$(BENCH) --quick native share user-net vsock start density </dev/null

bench-build:
	@resources/install-tools qemu-system-x86_64 passt
	@$(CARGO) build -q --release -p vmm --bin minivmm --example bench
	@$(CARGO) build -q --release --locked --manifest-path $(GUEST)/Cargo.toml --target-dir $(TARGET)/guest

# Sanitizers and coverage need unstable flags, which RUSTC_BOOTSTRAP allows on a stable compiler.
FUZZ_SECONDS ?= 60
fuzz: ## Fuzzes the devices: rings, commands, registers (FUZZ_SECONDS each)
	@resources/install-tools --build
	@command -v cargo-fuzz >/dev/null || $(CARGO) install cargo-fuzz
	cd tests/fuzz && for target in rx tx ctrl mmio pci rng blk balloon vsock fs fileserver image messages; do \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --fuzz-dir . $$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=4096 || exit 1; done

lint: ## Checks formatting, clippy, documentation and shell scripts
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc -q --workspace --no-deps
	cd $(GUEST) && $(CARGO) fmt --check && $(CARGO) clippy -- -D warnings
	cd tests/fuzz && $(CARGO) fmt --check && $(CARGO) clippy -- -D warnings
	@if command -v shellcheck >/dev/null; then shellcheck -x resources/install-tools resources/debian-image \
		resources/guest-init resources/lab-init resources/lab-qemu tests/run .ci/run; else echo "no shellcheck here: shell scripts not checked"; fi

clean: ## Removes what was built; downloads stay in ~/.cache/minivmm
	$(CARGO) clean
	cd $(GUEST) && $(CARGO) clean

# The commands that a person needs; each is written out in CONTRIBUTING.md.

STATE ?= $(CURDIR)/target/state
VIREO := target/release/vireo
# What the host needs besides a Rust toolchain.
PACKAGES := gcc libc6-dev make ca-certificates gpgv debian-archive-keyring e2fsprogs mount uidmap
# Peers and tools that tests compare with; without one, the tests that want it say so by name.
TEST_PACKAGES := $(PACKAGES) qemu-utils acpica-tools gnupg iproute2 cpio busybox-static xz-utils
BENCH_PACKAGES := $(PACKAGES) qemu-system-x86

.PHONY: all build run test e2e bench fuzz soak lockstep proof check packages test-packages bench-packages clean

all: build

packages test-packages bench-packages:
	@scripts/install-packages $(if $(filter packages,$@),$(PACKAGES),$(if $(filter test-packages,$@),$(TEST_PACKAGES),$(BENCH_PACKAGES)))

build: packages
	cargo build --release --locked

# A Debian guest, from nothing: with a terminal a shell in it, without one a look at it.
run: build
	@VIREO_STATE=$(STATE) VIREO=$(VIREO) scripts/run-debian

test: test-packages
	scripts/test

# Longer runs, not part of `make test`. See CONTRIBUTING.md.
bench: build bench-packages
	cargo run --release --locked --package vireo-bench -- $(BENCH_ARGS)

# Those of the tests that run whole Debian machines.
e2e: test-packages
	E2E=only scripts/test

fuzz: test-packages
	scripts/fuzz

soak: build test-packages
	scripts/soak

lockstep: build test-packages
	scripts/lockstep

proof: build test-packages
	scripts/proof

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

clean:
	cargo clean

# blockstep: `make help` lists what there is.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# A clone that another user owns (a CI checkout) has no VCS stamp to give.
export GOFLAGS ?= -buildvcs=false

TOOL    := go tool -modfile=internal/tools/go.mod
BIN     := bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
STATIC  := CGO_ENABLED=0 go build -trimpath -ldflags "-X github.com/blockstep/blockstep/internal/version.release=$(VERSION)"

# Everything but what has a step of its own: the end-to-end tests, which start
# processes, and the simulator, which has one goroutine, so that the race detector
# would only slow it down (the assertions that race implies are on in its step).
UNIT = $$(go list ./... | grep -v -e '/e2e' -e '/internal/sim$$')

STORY    ?=
FROM     ?=
SEEDS    ?= 20000
FUZZTIME ?= 30s
TIME     ?= 10m
ARGS     ?=
RUN      ?= .
CPUS     ?= 1

.PHONY: help demo build test deps deps-all vet race unit lint fmt fmt-check generate sim sim-coverage mutants fuzz crash e2e torture bench bench-quick bench-go test-kernel test-systemd check clean man units deb rpm deploy-check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## three nodes and a volume on loopback until Ctrl-C; STORY=1 [FROM=DIR] tells the whole story and ends
ifeq ($(STORY),)
	$(BIN)/blockstep demo
else
	@./internal/tools/deps.sh story
	PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/blockstep demo --story $(if $(FROM),--from "$(FROM)")
endif

build: ## static binaries in bin/
	@mkdir -p $(BIN)
	$(STATIC) -o $(BIN)/ ./cmd/...

test: deps-all vet lint race sim e2e test-kernel ## what CI runs: vet, linters, unit tests with -race, simulator, end-to-end tests, a real kernel

deps: ## the programs that the end-to-end tests need: installs them as root, else says what to install
	@./internal/tools/deps.sh test

# All at once and first, so that what is missing is said at once.
deps-all:
	@./internal/tools/deps.sh test kernel

vet:
	go vet ./...

lint: ## golangci-lint, at the version of internal/tools/go.mod (its first build takes minutes)
	$(TOOL) golangci-lint run

race: ## unit and crash tests with the race detector
	go test -race -timeout 10m $(UNIT)

unit: ## unit tests without the race detector: quick
	go test -timeout 5m $(UNIT)

fmt: ## gofumpt and gci over the tree
	$(TOOL) golangci-lint fmt

fmt-check:
	$(TOOL) golangci-lint fmt --diff

generate: ## go generate
	go generate ./...

sim: ## simulated clusters; SEEDS=1000000 runs on, a failing seed is printed; then their coverage of the state machine
	BLOCKSTEP_SIM_SEEDS=$(SEEDS) go test -tags invariants -timeout 0 -count 1 ./internal/sim/...
	@$(MAKE) --no-print-directory sim-coverage

# What 1,000 histories and the scenarios reach of the state machine, by themselves.
sim-coverage: ## statements of the state machine that the simulator reaches: fails below 90 %
	@mkdir -p build
	BLOCKSTEP_SIM_SEEDS=1000 go test -tags invariants -timeout 0 -count 1 -run 'TestHistories|TestScenario' \
		-coverpkg ./replication/core,./raft/state -coverprofile build/sim.cover ./internal/sim >build/sim.cover.log || { cat build/sim.cover.log; exit 1; }
	@awk -F '[: ]' '/replication\/core\/|raft\/state\/(seal|promote)\.go/ { n = split($$1, p, "/"); f = p[n-2] "/" p[n-1] "/" p[n]; \
		all[f] += $$3; if ($$4 > 0) hit[f] += $$3 } \
		END { for (f in all) { printf "  %-32s %5.1f %%\n", f, 100 * hit[f] / all[f]; a += all[f]; h += hit[f] } \
		printf "the simulator reaches %.1f %% of the state machine, 90 %% are asked for\n", 100 * h / a; exit h < 0.9 * a }' build/sim.cover

mutants: ## breaks the protocol in each named way, and demands that the simulator finds it
	go test -tags mutants -run TestMutants -parallel 2 -v -timeout 90m -count 1 ./internal/sim

fuzz: ## each fuzz target for FUZZTIME
	@set -e; \
	for file in $$(grep -rl --include='*_test.go' '^func Fuzz' cmd internal nbd raft replication); do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$file); do \
			echo "== $$target ($$(dirname $$file)), $(FUZZTIME)"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) ./$$(dirname $$file); \
		done; \
	done

crash: ## crash tests: power cut at every sync point of log, store and bitmap
	go test -count 1 -run 'Crash|Power|Torn|Recover' ./internal/vfs/... ./replication/...

e2e: deps build ## real processes and real clients; RUN=regexp chooses
	BLOCKSTEP_BIN=$(CURDIR)/$(BIN) go test -count 1 -timeout 12m -parallel 3 -run '$(RUN)' ./e2e

torture: deps build ## a long random run with real processes, judged for linearizability; TIME=10m
	BLOCKSTEP_E2E_TORTURE=$(TIME) BLOCKSTEP_BIN=$(CURDIR)/$(BIN) go test -count 1 -timeout 0 -v -run 'TestTorture' ./e2e

bench: build ## blockstep beside its peers, interleaved, judged by ratios; ARGS=… as of go run ./e2e/bench -help
	@./internal/tools/deps.sh bench
	go run ./e2e/bench -bin $(BIN) $(ARGS)

bench-quick: build ## the same in under three minutes
	@./internal/tools/deps.sh bench
	go run ./e2e/bench -bin $(BIN) -quick $(ARGS)

bench-go: ## Go benchmarks of each stage; compare two runs with benchstat (internal/tools/go.mod)
	go test -run '^$$' -bench . -benchmem $(UNIT)

# CPUS=2 emulates two processors in step with the host's clock: for machines with
# nothing else to do, since a guest that is kept waiting then sees time-outs.
test-kernel: ## a real /dev/nbdN: Debian's kernel in qemu, with file systems and power cuts; RUN=regexp chooses
	@./internal/tools/deps.sh kernel
	@mkdir -p build
	BLOCKSTEP_KERNEL_CPUS=$(CPUS) BLOCKSTEP_KERNEL_CACHE=$${BLOCKSTEP_KERNEL_CACHE:-$(CURDIR)/build/kernel} go test -tags kernel -count 1 -timeout 60m -parallel 3 -v -run '$(RUN)' ./e2e/kernel

test-systemd: build ## Debian with the package, booted by systemd in qemu: units, fstab, upgrade, reboot, poweroff (as root)
	@./internal/tools/deps.sh kernel systemd
	@mkdir -p build
	BLOCKSTEP_BIN=$(CURDIR)/$(BIN) BLOCKSTEP_KERNEL_CACHE=$${BLOCKSTEP_KERNEL_CACHE:-$(CURDIR)/build/kernel} go test -tags kernel,systemd -count 1 -timeout 60m -v -run 'TestSystemd$$' ./e2e/kernel

check: vet lint unit ## before a commit: vet, linters, unit tests

clean:
	rm -rf $(BIN)

man: build ## manual pages in build/man, made from the commands
	$(BIN)/blockstep man --dir build/man

units: ## systemd-analyze verify on all units, and the daemon's security score
	systemd/check.sh

deb: build ## the Debian package in build/, installed, upgraded and purged in a test root (as root)
	deploy/deb/test.sh $(BIN)
	deploy/deb/build.sh $(BIN) build

rpm: build ## the RPM package in build/, installed, upgraded and erased in a test root (as root)
	@./internal/tools/deps.sh rpm
	deploy/rpm/test.sh $(BIN)
	deploy/rpm/build.sh $(BIN) build

deploy-check: ## alerts by promtool, the Ansible role by ansible-playbook --syntax-check
	@./internal/tools/deps.sh deploy
	cd deploy/prometheus && promtool check rules blockstep.rules.yaml && promtool test rules blockstep.test.yaml
	ansible-playbook --syntax-check -i deploy/ansible/inventory.yaml deploy/ansible/blockstep.yaml

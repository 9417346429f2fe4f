# The commands of the house. Each of them sets the clone up first (scripts/setup.sh), which takes minutes once
# and nothing afterwards.
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# The question reaches the shell in the environment, as typed: neither make nor the shell expands anything in it.
ifdef ASK
override ASK := $(value ASK)
export ASK
run: answer
else
run: chat
endif

bin := .venv/bin
code := src tests bench scripts sim training packaging

packages := build/packaging/bin/python packaging/wheels.py

.PHONY: help setup run answer chat test test-long lint format bench sim native tiny docs clean test-pentium2 \
	wheels libllama bundle deb windows

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' Makefile | expand -t 14
	@echo 'CMAKE_ARGS=-DGGML_VULKAN=on (or another option of llama.cpp) before any of them chooses the build.'

setup: ## make .venv: libllama, Cordée and the starter model
	@sh scripts/setup.sh

run: ## chat over three nodes that may fall; ASK="…" answers one question on standard output

# By one process: it answers in half the time that a cluster of three takes to start, and beside a running demo.
answer: setup
	@exec $(bin)/cordee run starter -- "$$ASK"

# In a process group of its own (set -m), so that Ctrl-C stops an answer and not make.
chat: setup
	@if [ -t 0 ]; then set -m; fi; $(bin)/cordee demo

test: lint ## all that a change must pass: lint and the short tests; COVERAGE=1 reports what they run (slower)
	@$(bin)/python -m pytest -n 2 --dist loadfile $(if $(COVERAGE),--cov)

test-long: lint ## the short tests and those that take minutes
	@$(bin)/python -m pytest -m ''

test-pentium2: setup ## boot the emulated PC of 1997 (fetched once) and all that is about it; LONG=1 the long tests, too
	@sh scripts/pentium2_machine.sh
	@$(bin)/python -m pytest -rP $(if $(LONG),-m '') tests/pentium2

lint: setup ## check style, formatting and types, those of the page's JavaScript, too
	@$(bin)/ruff check $(code)
	@$(bin)/ruff format --check $(code)
	@$(bin)/basedpyright --level error
	@$(bin)/python scripts/check_js.py

format: setup ## rewrite the sources in the house's format
	@$(bin)/ruff check --fix $(code)
	@$(bin)/ruff format $(code)

sim: setup ## play whole clusters that fail: SEED=n one seed, SEEDS=count from there on (100,000 without either)
	@$(bin)/python -m sim $(if $(SEED)$(SEEDS),--seed $(or $(SEED),0) --seeds $(or $(SEEDS),1),--seeds 100000)

bench: setup ## measure beside plain libllama; LLAMA_SERVER=FILE beside that, too; JSON=1 prints one object a line
	@$(bin)/python bench/llama.py $(if $(JSON),--json)
	@$(bin)/python bench/serve.py $(if $(LLAMA_SERVER),--peer llama-server=$(LLAMA_SERVER)) $(if $(JSON),--json)

native: ## build the ternary engine for this machine into the package (needs a C compiler and nothing else)
	@$(MAKE) -C native

tiny: ## cross-build cordee-tiny for machines of 1997: build/pentium2 (Linux) and build/windows
	@$(MAKE) -C native tiny

libllama: ## build libllama for every CPU into build/libllama (9 minutes of a core; goes on where it was)
	@sh packaging/tools.sh
	@sh packaging/libllama.sh

wheels: setup libllama ## make dist/: Cordée, libllama and the starter model as wheels for every Python from 3.11
	@$(packages)

bundle: wheels ## make dist/cordee-bundle-…: a folder that installs Cordée on any Linux PC, without a network
	@$(bin)/python packaging/bundle.py

deb: bundle ## make dist/cordee_…_amd64.deb: the same as a Debian package, with a service that starts at boot
	@sh packaging/deb.sh

windows: setup ## make dist/cordee-VERSION-setup.exe for Windows (as root, on Debian: docs/windows.md)
	@sh packaging/windows/make.sh

docs: setup ## write docs/cli.md, the tables of docs/api.md and the picture of the rooms from the program itself
	@$(bin)/python scripts/cli_reference.py
	@$(bin)/python scripts/rooms.py
	@$(bin)/python scripts/api_reference.py

clean: ## remove .venv and every cache
	@rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find $(code) -name __pycache__ -prune -exec rm -rf {} +

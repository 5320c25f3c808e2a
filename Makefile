# The front door. Each target says what it does in `make help`.

.DEFAULT_GOAL := help
.PHONY: help run serve test check ci bench fuzz fmt gen clean

help: ## shows this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## holds a real model in memory, lets two processes compute with it without a copy, and three models take turns
	@tools/demo.sh

serve: ## keeps a daemon running and says what to try
	@tools/serve.sh

test: ## runs all tests, Rust and Python
	@cargo xtask test

check: ## everything else that CI checks: formats, lints, rules, references, licences, types
	@cargo xtask check

ci: ## check and test, exactly as CI does
	@cargo xtask ci

bench: ## measures, and prints a table beside what others reach
	@bench/run

fuzz: ## runs each fuzz target for a minute, where the nightly compiler and cargo-fuzz are
	@cargo xtask fuzz

fmt: ## formats everything
	@cargo xtask fmt

gen: ## writes the references that come from the code
	@cargo xtask gen

clean: ## removes what was built, the Python environment too
	@cargo clean

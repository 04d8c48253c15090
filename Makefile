# The three folders as one importable package, by links: what mypy and import-linter look at.
VIEW = build/types

.PHONY: check types test bench

check:
	ruff format --check .
	ruff check .

types:
	rm -rf $(VIEW) && mkdir -p $(VIEW)/graphopt && ln -s $(CURDIR)/graphopt/* $(CURDIR)/passes $(CURDIR)/kernels $(VIEW)/graphopt && ln -s $(wildcard $(CURDIR)/tests $(CURDIR)/benchmarks $(CURDIR)/examples) $(VIEW)
	cd $(VIEW) && mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache .
	cd $(VIEW) && lint-imports --no-logo --config $(CURDIR)/pyproject.toml

test:
	pytest

bench:
	for script in benchmarks/*.py; do python $$script $(ARGS) || exit 1; done

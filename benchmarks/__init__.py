"""Benchmarks: `make bench-NAME` runs one and writes benchmarks/results/NAME.json."""

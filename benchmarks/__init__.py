"""Benchmarks: each prints a table and writes JSON below `benchmarks/results`. Run as `python -m benchmarks.gateway`."""

"""The parts of `benchmarks/placement.py`."""

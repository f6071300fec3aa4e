"""The parts of `benchmarks/migration.py`: streams with a time per event, their stage, and each measurement."""

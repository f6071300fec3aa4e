"""The parts of `benchmarks/load.py`: what is loaded, by whom, and what the disk allows."""

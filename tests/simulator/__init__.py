"""The simulator: its models, and the runs of production cores in it."""

"""The scheduler: which model is attached where, and why."""

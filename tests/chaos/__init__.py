"""A whole Hearth under load while everything goes wrong that can: `python -m tests.chaos --seconds 3600 --seed 7`."""

"""Hearth's services and command line. Services are strangers to each other: they share contracts, never code."""

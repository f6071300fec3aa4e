"""Tests of the gateway alone, with a real NATS and a real Redis."""

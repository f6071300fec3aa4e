"""The worker: owns a device, attaches checkpoints, generates tokens."""

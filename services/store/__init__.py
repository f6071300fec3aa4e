"""The store: owns a server's tiers, imports checkpoints, makes them resident in DRAM and leases them."""

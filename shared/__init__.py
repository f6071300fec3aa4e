"""What the services share: contracts, the bus, the registry, the driver of cores. Knows no service."""

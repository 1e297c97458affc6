"""What all methods share: contract, trainer, networks, metrics, losses, state and data."""

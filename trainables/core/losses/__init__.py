"""Loss terms on plain tensors."""

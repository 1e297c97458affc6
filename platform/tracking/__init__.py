"""MLflow, written through a queue on disk."""

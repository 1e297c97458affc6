"""Images of both domains, and how they become batches."""

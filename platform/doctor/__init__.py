"""Whether everything is sound and the ledgers of each experiment agree."""

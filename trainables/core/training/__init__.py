"""The trainer of all methods."""

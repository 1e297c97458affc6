"""The driver: an experiment from its plan to its end."""

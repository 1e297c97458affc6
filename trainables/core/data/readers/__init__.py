"""Readers of the kinds of datasets, one module each."""

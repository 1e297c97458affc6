"""Pseudo labels: rules that make them, the files that hold them, and their quality."""

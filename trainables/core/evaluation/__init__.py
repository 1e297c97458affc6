"""Metrics, predictions and pictures of a network on validation and target images."""

"""Errors of a trained network."""

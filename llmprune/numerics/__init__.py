"""Arithmetic that algorithms share."""

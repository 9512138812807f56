"""Helpers for the whole package: one-line messages, shipped data files, safe YAML.

Imports nothing of the package.
"""

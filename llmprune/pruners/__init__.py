"""Pruners: they choose which weights to prune. Each file is one algorithm, named by its file."""

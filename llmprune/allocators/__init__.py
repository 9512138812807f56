"""Allocators: they divide the model's sparsity among its matrices.

Each file is one algorithm, named by its file.
"""

"""Allocators: overall sparsity to sparsity per matrix. One file is one algorithm."""

"""Packed sparse weights: products, packing and unpacking, natively where a library can be had, and on GPUs.

A matrix [R, C] is packed row by row: the kept values, a bit per column in words of 64 columns, where each
row's values start, and for int8 and int4 a scale per 128 columns. `docs/kernels.md` has the layout.
"""

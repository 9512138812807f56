"""Input statistics of matrices: algorithms declare which they need, and they are collected in forward
passes.
"""

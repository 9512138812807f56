"""Input statistics of matrices: algorithms declare which they need; they are collected in forward passes."""

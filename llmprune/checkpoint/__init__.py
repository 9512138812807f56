"""Reading and writing checkpoints as safetensors; the only part of the package that touches weight files.

Pickle files are never opened.
"""

"""Pruners: which weights go. One file is one algorithm; its name is the registry name."""

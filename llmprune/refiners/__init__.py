"""Refiners: they change the keep mask, but never its pattern or count. Each file is one algorithm."""

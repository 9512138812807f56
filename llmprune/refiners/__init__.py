"""Refiners: move the keep mask, never its pattern or count. One file is one algorithm."""

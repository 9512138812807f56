"""Figures that papers published, with the sources they were read in."""

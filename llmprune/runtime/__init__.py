"""Packed checkpoints at work: layers, how transformers loads them, and what they bring on a machine."""

"""Scores finished checkpoints: perplexity, zero-shot tasks, and a recount of zeros. Imports no algorithm."""

"""Scores finished checkpoints: perplexity, zero-shot tasks, and a recount from disk. Never imports an algorithm."""

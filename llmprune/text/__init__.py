"""Text for calibration and for perplexity, given by name or file, and how it becomes tokens."""

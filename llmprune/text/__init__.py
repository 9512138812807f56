"""Text by name or file, for calibration and for perplexity, and its tokens."""

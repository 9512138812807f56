"""The embedded demo model: a small Llama, trained on the source of Python's standard library."""

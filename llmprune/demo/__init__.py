"""The embedded default model: a small Llama really trained on the interpreter's own standard library."""

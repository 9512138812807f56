"""Updates: each file moves the kept weights and leaves the mask; its file name is its name."""

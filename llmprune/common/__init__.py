"""What every room may use: one-line messages, shipped data files, safe YAML. Imports nothing of the package."""

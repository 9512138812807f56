"""What a run prints on a terminal, in a pipe or in a notebook."""

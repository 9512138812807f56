"""From the names of models to folders, and from finished folders to repositories."""

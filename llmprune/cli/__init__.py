"""The command line: flags become arguments of the Python API, and errors become one line and an exit code."""

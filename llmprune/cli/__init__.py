"""The command line: options become arguments of the Python API, errors one line and an exit code."""

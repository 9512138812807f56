"""Which weights a mask keeps when it moves."""

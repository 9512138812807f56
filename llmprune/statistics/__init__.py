"""Input statistics: declared by algorithms, collected while a block runs forward."""

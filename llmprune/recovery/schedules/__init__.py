"""When masks move, how sparse they are, and what is dense meanwhile."""

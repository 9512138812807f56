"""The work itself, from the plan to the scored folder. `corridor` holds the one loop over blocks."""

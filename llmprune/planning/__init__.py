"""What a run will do, need and take, before it starts."""

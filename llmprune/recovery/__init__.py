"""Training with sparsity: one loop, and the parts it is put together from, each in a room of its own."""

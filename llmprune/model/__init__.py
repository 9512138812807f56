"""The model of a run: built without weights, its prunable matrices, and the inputs of its blocks."""

"""Updates: they change the kept weights and leave the mask. Each file is one algorithm, named by its file."""

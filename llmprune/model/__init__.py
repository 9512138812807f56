"""An empty model, its prunable matrices and its block inputs."""

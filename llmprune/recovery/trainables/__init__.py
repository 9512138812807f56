"""What is trained of a matrix, and the weight that it stands for."""

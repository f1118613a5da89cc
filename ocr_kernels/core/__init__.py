"""What every op is built on: registration with PyTorch, checks of arguments, memory formats, ways to kernels."""

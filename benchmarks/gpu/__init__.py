"""One round on a machine with a GPU: `python -m benchmarks.gpu`, which is `make gpu`."""

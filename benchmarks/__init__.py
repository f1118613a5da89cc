"""What needs a checkout: compiled code, errors, microbenchmarks, a round on a GPU, and the results with their pages."""

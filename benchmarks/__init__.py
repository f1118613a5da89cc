"""Times and floors of the ops: `python -m benchmarks`."""

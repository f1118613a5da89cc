"""A user's model: find step 4 in it, and run it on our ops."""

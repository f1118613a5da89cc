"""A user's model: find what computes OCR in it, replace it, report it, undo it."""

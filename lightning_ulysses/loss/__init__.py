"""The exact loss of an optimizer step over all its micro-batches and ranks."""

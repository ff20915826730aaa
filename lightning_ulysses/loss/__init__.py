"""The exact loss of a step that is spread over micro-batches and ranks."""

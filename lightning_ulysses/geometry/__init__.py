"""Who holds what: tokens, heads, documents. Nothing here knows of processes."""

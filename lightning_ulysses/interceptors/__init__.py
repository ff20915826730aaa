"""One file for each library whose functions are patched or checked while a strategy is set up."""

"""Which rank holds which tokens, heads and documents: pure arithmetic, without processes."""

"""Functions in which tokens meet outside of attention: state spaces, linear attention, causal convolutions."""

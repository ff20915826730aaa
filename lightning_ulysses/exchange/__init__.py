"""The process groups of a run and their collectives. Those with gradients come with their adjoint."""

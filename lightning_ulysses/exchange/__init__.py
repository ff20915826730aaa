"""A group of processes and its collectives, each with its adjoint."""

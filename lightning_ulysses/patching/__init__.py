"""How a function is replaced, found where it was bound early, kept out of graphs, and put back."""

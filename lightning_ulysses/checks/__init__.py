"""What is refused before the first step and in it."""

"""The command line, ``lightning-ulysses``."""

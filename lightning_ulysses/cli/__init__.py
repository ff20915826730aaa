"""The command line: ``lightning-ulysses``, and the names that strategies have in another program's."""

"""The private parts of Lightning and DeepSpeed that this package uses, pinned by tests."""

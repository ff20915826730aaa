"""Every private part of Lightning, DeepSpeed, torch and transformers that is used, pinned by tests."""

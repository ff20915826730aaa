"""Interceptors for Hugging Face transformers: attention, masks, positions, labels, router losses, generation."""

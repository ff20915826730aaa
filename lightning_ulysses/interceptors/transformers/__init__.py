"""Everything that is specific to Hugging Face transformers."""

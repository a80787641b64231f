"""The LLaMA model."""

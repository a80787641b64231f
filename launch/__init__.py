"""Scripts that start runs."""

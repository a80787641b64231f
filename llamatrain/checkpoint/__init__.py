"""Checkpoints: written whole or not at all, loaded on any mesh."""

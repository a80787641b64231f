"""Shards and their order; `shards` and `order` need no torch."""

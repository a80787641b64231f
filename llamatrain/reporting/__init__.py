"""What runs have left behind: read, compared, drawn. No torch."""

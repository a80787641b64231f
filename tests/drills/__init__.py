"""Drills: faults made on purpose, many times over, and what became of the run. `make drills`."""

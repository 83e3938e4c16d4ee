"""The published benchmarks: their scorers, their judge, their commands."""

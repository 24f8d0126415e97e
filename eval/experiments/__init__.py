"""The documented grids: many runs of `python -m train`, and one table of what they found."""

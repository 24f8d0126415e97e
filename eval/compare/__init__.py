"""One report over many finished runs: `comparison.compare` computes it, `report` writes it down."""

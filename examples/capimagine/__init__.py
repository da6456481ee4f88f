"""CapImagine (arXiv 2602.22766): imagination in words, from the data to its causal analysis."""

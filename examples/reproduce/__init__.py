"""Every figure and table of arXiv 2602.22766 by one command each."""

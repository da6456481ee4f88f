"""Recipes that use the library; run them from a clone: `python -m examples.capimagine.data`."""

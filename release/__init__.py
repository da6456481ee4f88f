"""The release checklist: `python -m release.check` from the root of the repository."""

"""Other codebases on our models, each in one file: `python -m examples.interop.with_captum`."""

"""Latent-reasoning baselines: models that imagine in states they feed back, taught five ways."""

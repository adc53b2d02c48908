"""Training: a spec in TOML, the budget in FLOPs, the trainer, and its resumable state."""

"""Our LoopMDM, read top to bottom: config, layers, the model, checkpoints."""

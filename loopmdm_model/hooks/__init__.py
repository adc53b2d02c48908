"""TransformerLens' habits: hook points at every loop, caches, the unrolled model, text in and out."""

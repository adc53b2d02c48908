"""Numbers and where they come from: frames, moments, provenance, what was measured and kept."""

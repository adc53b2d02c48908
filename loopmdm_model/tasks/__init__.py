"""Tasks: their data, held-out parts, what may be masked, the exact answer."""

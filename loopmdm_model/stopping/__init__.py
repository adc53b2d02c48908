"""When to stop looping: rules that look at one loop at a time."""

"""When to stop looping: rules that look at one loop at a time, and the loop that asks them."""

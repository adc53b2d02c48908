"""Plots: tidy frame in, Axes out; no torch, no statistics, no files. `ax` is drawn into, `kws` style it."""

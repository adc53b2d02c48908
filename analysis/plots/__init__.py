"""Plots: tidy frame in, Axes out; no torch, no statistics, no files."""

"""Watching a model run: groups of queries and keys, one walk over patterns, one over states."""

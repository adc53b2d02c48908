"""What a loop does: attribution, patching and what else people explain computation with, loop by loop.

All of it is checked on `naked_singles`, a model whose mechanism is known, and has its null on untrained ones.
"""

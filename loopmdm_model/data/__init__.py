"""Corpora, tokenizers, the Sudoku task, and batches made of them."""

"""What a trained model can do, by number of loops: tidy tables with errors.

`nll` test NELBO; `noise-level` where looping gains; `zero-shot` NELBO on corpora it never saw; `excess-kl` over
the exact posterior of `tree` and `markov`, by hops; `solve-rate` of Sudoku by clue count and generation order;
`generative` perplexity of samples under a judge, by denoising steps; `multiple-choice` and `word-problems` on
benchmarks.
"""

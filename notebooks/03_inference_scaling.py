# %% [markdown]
# # Do more loops at inference help?
#
# S is chosen at inference. The paper reports that likelihood, zero-shot perplexity and samples all improve as
# S grows, that most of the gain is there at half of S_max, that S = 1 is worse than the non-looped twin, that
# S beyond S_max still improves, and that the gain is largest at intermediate noise.
#
# Each of these can fail by itself. A curve over S that is flat or rises counts against the first; a minimum
# before S_max against the one about larger S; a gain that peaks at an end against the last. And a looped model
# can gain from looping and still be worse than its twin: improvement over one's own S = 1 is not yet an
# argument for looping.

# %% tags=["parameters"]
model = "sudoku-loop"
n = 64
seed = 0

# %%
import pandas as pd
import torch

from loopmdm.analysis import Case, claims_table, figures, nelbo_decomposition
from loopmdm.analysis.measures.stopping import equal_flops_pairs
from loopmdm.analysis.numbers import stats
from loopmdm.model import nelbo, nelbo_by_loop
from loopmdm.model.flops import forward_flops

_ = torch.set_grad_enabled(False)
case = Case.of(model, n=n, seed=seed)
m, tokens, s_max = case.m, case.tokens, case.m.cfg.max_loops
m

# %% [markdown]
# ## One trajectory tells all S
#
# The states of a run with S loops are those of a longer run, cut short. So the NELBO at every S costs one
# trajectory and a read-out a loop, and all S are compared on the same masks. `change` is paired, so that what
# makes a sequence hard or easy drops out of it; compare its error with that of the level.

# %%
options = {"n_samples": 1, "maskable": case.maskable, "clusters": case.clusters, "seed": seed}
by_loop = nelbo_by_loop(m, tokens, 3 * s_max, **options)
once, rows = by_loop[0], []
for s, r in enumerate(by_loop, start=1):
    change, change_se, _ = stats.mean_and_error((r.per_sequence - once.per_sequence).numpy(), case.clusters)
    rows.append((s, r.mean, r.standard_error, float(change), float(change_se), r.flops / once.flops))
columns = ["n_loops", "nelbo", "nelbo_se", "change", "change_se", "flops_ratio"]
pd.DataFrame(rows, columns=columns).set_index("n_loops").round(4)

# %% [markdown]
# `flops_ratio` is the cost of such a forward by that of one loop: what a gain has to be worth. The same number
# by the plain route, as a check:

# %%
assert abs(nelbo(m, tokens, n_loops=s_max, **options).mean - by_loop[s_max - 1].mean) < 1e-6

# %% [markdown]
# These few sequences are for looking. Here is the whole test set, with all seeds, and the non-looped arms beside.

# %%
figures.FIGURES["nll-by-loops"].show()

# %% [markdown]
# Look at three places: S = 1 against the base arm; S_max; and what happens to the right of the dash-dotted
# line, where no model was trained. Panels b and d show the paired change, from which the share of the gain
# at half of S_max can be read.
#
# ## Whole puzzles
#
# NELBO counts single tokens. A puzzle is solved only if all hidden cells fit together, so the two need not
# agree, and the best S need not be the same.

# %%
figures.FIGURES["sudoku-solve-rate"].show()

# %% [markdown]
# The larger board costs more to learn than our budget pays for: both arms are far from solving it, which says
# nothing about loops.
#
# ## The other tasks
#
# Does the shape of the curve, a fall to about S_max and a rise after it, hold on other data? Each panel has its
# own axis (word problems, which nobody learned, are read to S_max only); the band of a single seed says how sure
# a value is over test items, not over runs.

# %%
figures.FIGURES["nll-by-loops-elsewhere"].show()

# %% [markdown]
# ## Word problems
#
# Grade-school arithmetic in words is one of the paper's tests of reasoning (GSM8K: up to 8.5 points above the same
# size, and above a deeper model). The templates of the test are unseen. A small model can learn how such an answer
# is worded long before it can compute one, so the NELBO of worked answers and the share of right ones are
# different questions. If panels b and c are at chance level, only a can say something about loops,
# and its bands, over ten templates, say how little.

# %%
figures.FIGURES["word-problems"].show()

# %% [markdown]
# ## Where the gain is
#
# The NELBO is the mean of the cross-entropy over mask ratios, so it can be taken apart by them. `gain` is the
# loss at S = 1 less that at S, on the same sequences and masks. At low ratios there is little to work out, at
# high ratios little to work with: a gain that peaks between is what one would expect if loops pass information
# among hidden positions, but other explanations give the same shape.

# %%
parts = nelbo_decomposition(m, tokens, s_max, n_bins=5, **options | {"n_samples": 2})
parts.query("n_loops == @s_max")[["mask_ratio", "nll", "gain", "gain_standard_error", "n"]].round(3)

# %%
figures.FIGURES["gain-by-noise"].show()

# %% [markdown]
# ## Text of other kinds
#
# The text models read speeches. Zero-shot means corpora of another kind; several are stand-ins for the paper's
# and named as such. The paper finds the looped model ahead on all seven, so one corpus on which base is ahead
# counts against the claim as it is worded.

# %%
figures.FIGURES["zero-shot"].show()

# %% [markdown]
# ## Samples
#
# A larger language model as a judge gives a *generative perplexity*. It can be gamed: repetitive text scores
# well. So the entropy of a sample's unigrams stands beside it, and the same for real text. At our sizes
# samples are far from real text, and the judge's number says little about S; read the panel for whether the
# differences between loop counts exceed their bars at all.

# %%
figures.FIGURES["generative"].show()

# %% [markdown]
# ## Loops or steps?
#
# A sampler can spend FLOPs in two ways: deeper forwards, or more of them. These pairs of loops and denoising
# steps cost the same:

# %%
length = tokens.shape[1]
budget = 8 * forward_flops(m.cfg, length, s_max)
pairs = equal_flops_pairs(m.cfg, length, [budget], (1, 2, s_max, 2 * s_max), most_steps=length)
pd.DataFrame(pairs, columns=["FLOPs a sequence", "n_loops", "steps"])

# %% [markdown]
# Steps cannot change what the model says about single tokens, but they let later tokens see earlier ones:
# they buy coherence. Loops may buy both.

# %%
figures.FIGURES["loops-or-steps"].show()

# %% [markdown]
# ## Verdicts

# %%
mine = ["one-loop-is-worse", "more-loops-are-better", "monotone-in-loops", "most-by-half", "better-beyond-s-max",
        "needs-many-loops-to-beat-base", "solves-what-shallow-cannot", "solves-more-beyond-s-max",
        "intermediate-noise", "zero-shot", "generative-perplexity-falls", "falls-most-at-few-steps",
        "loops-for-steps", "reasoning", "downstream"]  # fmt: skip
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=3)

# %% [markdown]
# ## Limits
#
# One S_max per arm, and small ones. The paper's S = 24 over S = 12 is asked here as 2 S_max over S_max. NELBO
# is a bound, and its gap to the likelihood may itself depend on S. Zero-shot windows are short. A judge that
# finds all samples bad cannot rank them.

# %% [markdown]
# # Can a model know when to stop?
#
# The paper stops looping when the state changes little, and finds that twelve loops become about five at the
# same performance. Two things are in that sentence. *Fewer loops suffice*: some number below S_max does as
# well. *The rule knows where*: it stops early on the sequences that need less. Only the second is adaptive; for
# the first one could simply run fewer loops everywhere.
#
# So a rule has three controls at equal FLOPs: a fixed S, a schedule that looks at the mask ratio alone, and
# the rule's own loop counts, shuffled among sequences of like mask ratio. A rule that does not beat all three
# has saved nothing by looking. The threshold and its scope are not public; ours are stated.

# %% tags=["parameters"]
model = "sotu-loop"
n = 48
seed = 0

# %%
import time

import pandas as pd
import torch

from loopmdm.analysis import Case, claims_table, figures, tables
from loopmdm.analysis.measures import stopping
from loopmdm.model import FixedLoops, StateDelta, sample

_ = torch.set_grad_enabled(False)
case = Case.of(model, n=n, seed=seed)
m, s_max = case.m, case.m.cfg.max_loops
m

# %% [markdown]
# ## A rule at work
#
# A rule is a small object with a threshold. Here: the relative change of the state at masked positions, averaged
# over a sequence. First every sequence runs to the end with threshold 0, which records the criterion and never
# stops; then a threshold in the middle of what was seen is used. A sequence that stops leaves the batch.

# %%
b = case.masked(0.5)
full = m.run(b.tokens, stop=StateDelta(threshold=0.0, max_loops=s_max, positions="masked"))
middle = full.criterion[1:].median().item()
rule = StateDelta(threshold=middle, max_loops=s_max, positions="masked")
run = m.run(b.tokens, stop=rule)
print(f"threshold {middle:.3f}; loops used, by number of sequences:")
pd.Series(run.loops_used).value_counts().sort_index()

# %% [markdown]
# Within one forward a rule changes nothing before it stops. So one full run tells where it would have stopped
# at any threshold; `replay` reads that off, and agrees with the run:

# %%
assert torch.equal(rule.replay(full.criterion), run.loops_used)
full.criterion[1:].mean(1)

# %% [markdown]
# ## The frontier
#
# One record per split holds the losses after every loop and every rule's criterion; then all rules and
# thresholds are compared on the same sequences and masks. Thresholds are chosen on validation and judged on
# test. FLOPs include what a rule reads: a rule that looks at logits pays for them in every loop.

# %%
options = {"max_loops": s_max, "n_samples": 1}
rules = stopping.default_rules(s_max)
record = stopping.record_loops(
    m, case.tokens, rules, maskable=case.maskable, clusters=case.clusters, seed=seed, **options
)
validation = case.validation.tokens[:n]
fitted = stopping.record_loops(m, validation, rules, maskable=case.validation.maskable, seed=seed + 1, **options)
print(*record.rules, sep=", ")
print("mean loss after each loop:", record.losses.mean(1).numpy().round(3))

# %% [markdown]
# The line of losses says where the best fixed S lies. If it lies before S_max, then stopping early *improves*
# the loss, and so does any rule that stops at about that loop, for whatever reason. The figure goes on to twice
# S_max.

# %%
figures.FIGURES["stopping-frontier"].show()

# %% [markdown]
# Look at the distance between a rule and the *fixed* and *scheduled* lines at the same FLOPs, not at the
# distance to S_max. The oracle sees the answer: it bounds what could be won by knowing where to stop.
#
# ## The two verdicts
#
# *Non-inferior*: at the largest threshold that passes on validation, is the loss on test worse by less than a
# twentieth of what looping gains? *Useful*: does the best threshold beat all three controls? First on the few
# sequences from above, then the committed table of the full run. A `flops_share` above 1 belongs to a rule that
# costs more than the loops it saves: reading logits after every loop is dear in a small model.

# %%
bound = stopping.noninferiority(record, fitted, "state-delta")
keys = ("verdict", "mean_loops", "of_loops", "flops_share", "increase", "gain", "low", "bound", "n")
pd.Series({key: bound[key] for key in keys})

# %%
useful = stopping.usefulness(record, fitted)
useful[["rule", "verdict", "mean_loops", "against_fixed", "against_schedule", "against_shuffled", "n"]].round(4)

# %%
judged = tables.load("stopping-verdicts").query("model == @model")
judged[["rule", "verdict", "mean_loops", "of_loops", "flops_share", "useful", "useful_loops", "n"]].round(3)

# %% [markdown]
# ## Where the loops go
#
# If a rule spent loops on what is hard, positions with a high loss would get more of them. `rank_correlation`
# is that of the criterion with the gain still to come: a criterion worth stopping on has it well above 0.

# %%
known = stopping.calibration(record, "state-delta").drop_duplicates("loop")
known[["loop", "rank_correlation"]].set_index("loop").T.round(2)

# %%
figures.FIGURES["loops-used"].show()

# %% [markdown]
# ## Time
#
# FLOPs are not seconds. Sequences that leave a batch make it smaller, not always faster, and a rule has to be
# computed. Here two sampling runs with and without the rule, by turns, the faster one of each; then the measured
# ones.

# %%
rows, start = [], case.masked(1.0).rows(slice(0, 16))
for name, stop in 2 * [("all loops", FixedLoops(max_loops=s_max)), ("state-delta", rule)]:
    began = time.perf_counter()
    s = sample(m, clues=start, steps=8, stop=stop, seed=seed)
    used = s.loops_used[s.loops_used > 0].double().mean().item()
    rows.append((name, s.flops, used, time.perf_counter() - began))
pd.DataFrame(rows, columns=["rule", "FLOPs", "mean loops", "seconds"]).groupby("rule").min()

# %%
figures.FIGURES["sampling-savings"].show()

# %% [markdown]
# ## Beyond a threshold
#
# Two ways to spend loops that are not a threshold on one number. A *schedule* gives each mask ratio its number
# of loops, at a price per FLOP, fitted on validation. A *predictor* regresses the gain still to come on cheap
# features of the state and stops where no later loop is worth its price. `r2` and `rank_correlation` say how well
# the gain is foreseen on unseen sequences; near 0 there is nothing to act on. The last table has a row for each of
# five prices, and the contrasts with the controls: below 0 the predictor is better.

# %%
plans = stopping.schedules_by_noise(fitted, n_prices=5)
plans.pivot(index="threshold", columns="mask_ratio", values="n_loops").rename_axis(index="nats per FLOP")

# %%
features = stopping.feature_rules(s_max)
shared = {"rules": features, **options}
seen = stopping.record_loops(m, case.tokens, maskable=case.maskable, clusters=case.clusters, seed=seed, **shared)
learnt = stopping.record_loops(m, validation, maskable=case.validation.maskable, seed=seed + 1, **shared)
stopping.prediction_quality(seen, learnt, features=("state",)).round(3)

# %%
best = stopping.predictor_frontier(seen, learnt, n_prices=5, features=("state",))
best = best[best["mask_ratio"].isna()].reset_index(drop=True)
best[["mean_loops", "flops", "nll", "against_fixed", "against_schedule", "against_shuffled", "n"]].round(4)

# %% [markdown]
# ## Verdicts

# %%
mine = ["stopping-halves-loops", "stopping-knows-where"]
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=4)

# %% [markdown]
# ## Limits
#
# Our S_max is small, so there is less to save than with twelve loops, and a fixed S near the best one is a
# strong control. The non-inferiority margin is a share of a gain: where looping gains little, it is a small
# number, and "undecided" is the honest answer. The predictor here is fitted on few sequences; the committed
# table `gain-predictor` has the full one. Times are of one machine.

# %% [markdown]
# # Does the gain go through the edges among masked positions?
#
# Attention maps show where a model looks. They do not show what the looking is for. "Looping works because
# masked positions interact" is a causal claim, and asks for an intervention: take the edges from masked queries
# to other masked keys away, in the looped layer, and see whether looping still gains.
#
# The estimand is an interaction, not a loss. A cut hurts any model that is not used to it. The question is
# whether the cut takes away what *looping* adds:
#
#     gain = NELBO(S = 1) - NELBO(S)          mediated share = 1 - gain with the cut / gain without
#
# The control is a cut of random edges that carry the same attention at the same distances. If that costs as
# much, the masked-to-masked edges are nothing special, and the claim fails. It also fails if the gain survives.

# %% tags=["parameters"]
model = "sudoku-loop"
base = "sudoku-base"
n = 48
seed = 0

# %%
import pandas as pd
import torch

from loopmdm.analysis import Case, Reference, ablate, claims_table, cut, damp, figures, freeze, patch, skip, stale
from loopmdm.analysis.measures import interventions
from loopmdm.analysis.measures.interventions import effect_by_loop, mediated_share
from loopmdm.analysis.measures.interventions.training_free import training_free
from loopmdm.model import nelbo

_ = torch.set_grad_enabled(False)
case = Case.of(model, n=n, seed=seed)
m, s_max = case.m, case.m.cfg.max_loops
options = {"n_samples": 1, "maskable": case.maskable, "clusters": case.clusters, "seed": seed}
m

# %% [markdown]
# ## One model, with and without
#
# An intervention is a context manager: inside it the model is the same but for the edges. `none` cuts nothing,
# but takes the explicit attention path, so that both arms differ in the cut alone. Sequences and masks are
# paired by seed.

# %%
arms = {
    "intact": cut(m, "none"),
    "masked->masked cut": cut(m, "masked->masked"),
    "masked->clean cut": cut(m, "masked->clean"),
    "random edges, equal mass": cut(m, "masked->masked", matched=True, seed=seed),
    "masked->masked cut from loop 2 on": cut(m, "masked->masked", loops=slice(2, None)),
    "masked values of loop 0": stale(m, "masked"),
}
rows = []
for name, arm in arms.items():
    with arm:
        rows.append((name, *(nelbo(m, case.tokens, s, **options).mean for s in (1, s_max))))
levels = pd.DataFrame(rows, columns=["arm", "S = 1", "S_max"]).set_index("arm")
levels.assign(gain=levels["S = 1"] - levels["S_max"]).round(3)

# %% [markdown]
# Read the last column. *Masked values of loop 0* (`stale`) keeps every pattern, but feeds the values that masked
# keys had in the first loop: the positions are there and are attended to, only what they found out since is
# withheld.
#
# ## Mediated share
#
# The same as a share of the gain, with 95% intervals over sequences, paired.

# %%
shares = mediated_share(m, case.tokens, s_max, **options)
shares[["edges", "matched", "gain_intact", "gain", "share", "low", "high", "n"]].round(3)

# %% [markdown]
# 0: the gain survives; 1: nothing is left; above 1: with the cut more loops do harm. Shares are not parts of a
# whole and need not add up to 1.

# %%
figures.FIGURES["mediated-share"].show()

# %% [markdown]
# Compare, seed by seed, the first mark with that of the matched random cuts. Where they overlap, the
# experiment does not tell masked-to-masked edges from any other edges of that weight.
#
# ## When, and at which noise
#
# The cut at one loop alone, by mask ratio: how much does the loss at S_max rise, per masked token? Live for a
# few sequences, and then the figure for the sample, with `stale` beside.

# %%
effects = effect_by_loop(m, case.tokens, lambda loops: cut(m, "masked->masked", loops), s_max, n_bins=2, **options)
effects.pivot(index="mask_ratio", columns="loop", values="effect").round(3)

# %%
figures.FIGURES["cut-effects"].show()

# %% [markdown]
# Look along a row: an effect that sits in the first loop alone says that the later loops do not need the
# edges. Look down a column: at high mask ratios there is little else to attend to.
#
# ## In nats, with the first loop intact
#
# A cut in all loops also changes S = 1, and a cut moves mass to other keys. So: leave the first loop alone, and
# beside the cut let keys hand on what they hold in another sequence under the same mask. Pattern, mass and scale
# stay; only the content is gone. "any->masked" hides masked keys from clean queries too, which could relay them;
# the control takes edges to masked and to clean keys of equal mass.

# %%
from_masked, hidden = interventions.EdgeSet("masked->masked"), interventions.EdgeSet("any->masked")
sets = [from_masked, hidden, *(interventions.EdgeSet(side=side) for side in ("within", "outside"))]
arms = [interventions.Arm(kind, edges) for edges in sets for kind in ("cut", "resample", "mean")]
trial = interventions.Trial(s_max, n_bins=2, n_draws=2, seed=seed)
lost = interventions.causal_effects(m, case.sequences, arms, trial)
lost[lost["mask_ratio"].isna()].pivot_table("effect", ["edges", "side"], "kind", sort=False).round(3)

# %%
figures.FIGURES["causal-edges"].show()

# %% [markdown]
# Read the orange marks first: content that does not matter would leave them at 0. Then compare the two rows of
# equal mass. The gain of looping is the dashed line: whatever costs more than that also did more than loops add.
#
# ## Heads, states, layers
#
# The other interventions nest and combine in the same way. Each line is a NELBO at S_max: one head cut;
# clean states held while masked ones go on; every loop's step halved; the looped layer left out in one loop.

# %%
others = {f"head {head} cut": cut(m, "masked->masked", heads=[head]) for head in range(m.cfg.n_heads)}
others |= {"clean states held": freeze(m, "clean"), "steps halved": damp(m, 0.5)}
others |= {"looped layer left out in loop 1": skip(m, loops=1)}
for name, arm in others.items():
    with arm:
        print(f"{name:35s}{nelbo(m, case.tokens, s_max, **options).mean:.3f}")

# %% [markdown]
# Nothing in place of something is a thing that the model never saw. `by=` says what stands in: zeros, another
# sequence's activation under the same mask, or the mean of several. Nats per hidden token that a head's absence
# costs, in all loops at once:

# %%
b = case.masked(0.5)


def loss():
    return torch.nn.functional.cross_entropy(m(b, s_max)[b.masked], b.clean[b.masked]).item()


stand_ins = {"zero": "zero", "resample": Reference.resample(m, b, n_loops=s_max, seed=seed)}
stand_ins |= {"mean": Reference.mean(m, b, n_loops=s_max, seed=seed)}
whole, costs = loss(), {}
for name, by in stand_ins.items():
    for head in range(m.cfg.n_heads):
        with ablate(m, heads=[head], by=by):
            costs[name, head] = loss() - whole
pd.Series(costs).unstack().rename_axis("head", axis=1).round(3)

# %% [markdown]
# Where the rows disagree, ask what each leaves in place: a mean says nothing in particular, zero may be far from
# it, and another board's activation says something definite and wrong.
#
# Chapter 11 goes on from here: patching part by part, and swapping the states of cells that should be alike.

# %% [markdown]
# `patch` puts a state from elsewhere in place. With the state after loop 0 in place of that after loop 1 the run
# starts over from there, and is the model with one loop less: a check that the parts fit.

# %%
b = case.masked(0.5)
first, _ = next(m.states(b.tokens, 1))
with patch(m, 1, first):
    torch.testing.assert_close(m(b.tokens, s_max), m.model(b.tokens, s_max - 1))

# %% [markdown]
# ## Trained without the edges
#
# A cut at inference meets a model that never trained for it. The stronger control is a model trained without
# these edges in its middle layer, looped and not: a two by two. With masked-to-masked edges alone gone
# (`forbid_mask_to_mask`) clean cells still pass on what masked ones hold; with masked keys hidden from all other
# queries (`forbid_masked_keys`) nobody does. If looping gains as much there, the paper's explanation of *why*
# looping works is wrong for this task, whatever the cuts say.

# %%
figures.FIGURES["trained-two-by-two"].show()

# %% [markdown]
# ## Looped without training for it
#
# The last control turns things round: take a model that was never looped and run its middle layer S times, in
# full steps or each step damped by 1/S. Does the NELBO fall? And do the masked-to-masked log-odds rise from
# loop to loop although nobody trained for it? What rises here too is no mark of training with loops.

# %%
plain = Case.of(base, n=n, seed=seed)
looped = training_free(
    plain.m, plain.tokens, plain.maskable, n_loops=(1, 2, 4), blocks=[(1, 1)], n_samples=1,
    clusters=plain.clusters, seed=seed,
)  # fmt: skip
looped[["damping", "n_loops", "nelbo", "change", "change_se", "rise", "rise_se", "n"]].round(3)

# %%
figures.FIGURES["training-free"].show()

# %% [markdown]
# ## Verdicts

# %%
mine = ["masked-positions-interact", "gain-needs-mask-to-mask", "update-matters", "trained-without-mask-to-mask",
        "training-free"]  # fmt: skip
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=3)

# %% [markdown]
# ## Limits
#
# A share has the gain in its denominator: where looping gains little, it is wide or does not exist. Cuts take
# a model off its training distribution; the matched control has the same defect, which is why it is there. All
# edges of a kind are cut at once, in one looped layer; what a single edge carries is another question. `stale`
# withholds updates of values, while queries and keys go on.

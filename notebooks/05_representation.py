# %% [markdown]
# # Do the loops refine, and do they converge?
#
# "Refinement" suggests a picture: each loop moves the state a little closer to where it belongs, steps get
# shorter, and at some point one more loop changes nothing. Stopping early on a small change of the state, as
# the paper does, supposes something like it.
#
# The picture can be wrong in two ways. The answer may stop improving while the state moves on. And the state
# may *seem* to settle because it grows: in a pre-norm model every layer adds to the stream, and a step of
# constant length is a smaller and smaller share of a longer and longer state. Steps that do not get shorter
# count against convergence, however fast the relative change falls.

# %% tags=["parameters"]
model = "sudoku-loop"
n = 32
far = 64
seed = 0

# %%
import tempfile

import numpy as np
import pandas as pd
import torch

from loopmdm.analysis import Case, claims_table, figures, read_loops, record, representation_change
from loopmdm.analysis.measures.representation import convergence, loop_similarity, settled_loops, settled_means
from loopmdm.analysis.measures.representation.gain import perturbation_gain

_ = torch.set_grad_enabled(False)
case = Case.of(model, n=n, seed=seed)
m, s_max = case.m, case.m.cfg.max_loops
b = case.masked(0.5)
m

# %% [markdown]
# ## The null: a constant drift
#
# Take a state that starts at zero and moves by the same vector in every loop. It never settles. Its relative
# change is 1, 1/2, 1/3, ...:

# %%
step = np.ones(8)
states = [step * (i + 1) for i in range(6)]
[round(float(np.linalg.norm(step) / np.linalg.norm(state)), 3) for state in states]

# %% [markdown]
# So a falling curve alone proves nothing, and `drift_null` stands beside every relative change.
# `step_cosine` says whether successive steps point the same way (1: on a line; 0: at right angles).

# %%
change = representation_change(m, b, n_loops=3 * s_max, clusters=case.clusters)
masked = change[change["token_group"] == "masked"].pivot(index="loop", columns="metric", values="value")
masked[["step_norm", "state_norm", "relative_change", "drift_null", "step_cosine", "top1_flips"]].round(3)

# %% [markdown]
# Read the first two columns before the third. The figure has the same on the whole sample, with what the
# read-out does beside it: KL between successive answers and the share of best tokens that flip can go to zero
# while the state moves on, in directions that the read-out does not see.

# %%
figures.FIGURES["representation-change"].show()

# %% [markdown]
# ## Two lenses
#
# What does the state say after loop *i*? Through the coda it says what the model would say if it stopped
# there. Unembedded directly it says what is linearly there, without the layers that were trained to read it.
# The two can disagree, and neither is the truth about the state.

# %%
few = b.rows(slice(0, 8))
lenses = pd.concat([read_loops(m, few, n_loops=2 * s_max, lens=lens) for lens in ("coda", "direct")])
lenses[lenses["masked"]].groupby(["loop", "lens"])[["p_true", "entropy", "correct"]].mean().unstack().round(3)

# %%
figures.FIGURES["lenses"].show()

# %% [markdown]
# Look for whether p(true) still rises up to S_max, and what happens behind it. A fall says that loops beyond
# training undo something.
#
# Two more are fitted, a tuned lens on validation and a Jacobian lens from the coda's own derivative; and probes
# ask for what no logit says. Chapter 11 shows whether they beat the coda, and an untrained twin's probes.
#
# ## When an answer is there to stay
#
# Means over hidden positions: the loop at which the final answer first *appears*, and from which it stays
# (*settled*); the same for the true token, where it is the final answer (*correct* says how often). The gap
# between the two is time spent on other answers.

# %%
settled_means(settled_loops(m, b, s_max), case.clusters).round(3)

# %% [markdown]
# ## Similarity of loops
#
# CKA compares two sets of states up to rotation and scale. A state that only grows counts as unchanged. The
# estimator is debiased: the usual one is close to 1 for a few samples of many dimensions, whatever they are.
# Loop -1 is what the prelude hands over.

# %%
similar = loop_similarity(m, b, n_loops=s_max, clusters=case.clusters).query("token_group == 'masked'")
similar.pivot(index="loop", columns="other_loop", values="value").round(2)

# %%
figures.FIGURES["similarity"].show()

# %% [markdown]
# ## Far out
#
# Whether a state converges shows far beyond S_max. Two slopes are fitted over the later half of the loops: the
# log of the relative change against log loop, and the log of the step length. A constant drift gives -1 and 0.
# The verdict in the table is strict: *converges* if both are clearly below -1 (steps that shrink like 1/i still
# add up to an endless path), *drifts* if the steps hardly shrink, else *undecided*.

# %%
slopes = convergence(m, b, far, clusters=case.clusters)
slopes.query("token_group == 'masked'")[["metric", "value", "low", "high", "verdict", "n"]].round(3)

# %%
figures.FIGURES["far-out"].show()

# %% [markdown]
# Panel b asks the sharper question: how far does one more loop move the state at the end? Quantities
# that belong to a fixed point, such as the spectral radius of the loop's Jacobian, are reported only where the
# residual verifies that there is one.
#
# ## A small push
#
# Does a loop damp or amplify? A small push at one position is followed through the loops by the map's own
# derivative: how large it is after each, at its place and elsewhere. Chapter 11 draws it by relation.

# %%
gain = perturbation_gain(m, few, s_max).query("metric == 'gain' and receiver == 'any' and loop >= 0")
gain.pivot_table("value", ["relation", "distance"], "loop").head(8).round(3)

# %% [markdown]
# ## States on disk
#
# What is read often is written once: the states after each loop at every masked position, in shards that a
# killed run goes on from (`loopmdm record` does it from a shell). They are read back when asked for: here how far
# the states of different positions lie apart after each loop.

# %%
with tempfile.TemporaryDirectory() as folder:
    store = record(case, f"{folder}/states")
    print(f"{len(store):,} positions x {len(store.sites)} loops, {store.n_bytes / 1e6:.1f} MB")
    states = [store.select(loop=loop, nominal_mask_ratio=0.5) for loop in range(s_max)]
spread = pd.Series([float(state.std(0).norm()) for state in states], name="spread").rename_axis("loop")
spread.round(2)

# %% [markdown]
# ## Paths
#
# An illustration, not a test: the mean state of some sequences, from what enters the loop to S_max, in the
# plane that holds most variance. What looks like standing still may move in the directions that are not drawn.

# %%
figures.FIGURES["state-paths"].show()

# %% [markdown]
# ## Verdict

# %%
verdicts = claims_table().query("claim == 'loops-converge'").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=3)

# %% [markdown]
# ## Limits
#
# The window is finite: a very slow contraction looks like a drift, and "undecided" then means "run further".
# Slopes are means over sequences; a few may behave otherwise. Norms depend on the parametrisation: a model
# with a norm after the loop, or with input injection, has another null. None of this says whether the answer
# is good.

# %% [markdown]
# # A tour in ten minutes
#
# A *masked diffusion language model* writes by filling in hidden tokens, in any order. A *looped* one runs
# some of its middle layers several times with the same weights. The paper "Looped Diffusion Language Models"
# (LoopMDM, arXiv 2605.26106) says that this saves training compute, improves reasoning, and works because
# *masked positions interact*: what one hidden place has worked out helps the next one in the loop that follows.
#
# The paper's code and weights are not public. The models here are small ones that we trained, and the
# definition of every measure is ours. So nothing below says what the paper's models do. It says how to look,
# and what our models show when one does.
#
# This notebook is for someone who knows TransformerLens. It opens a model, keeps what happens in every loop,
# reads what each loop would answer, changes one loop, lets the model write, and ends with the paper's claims
# beside what we measured. The other ten take up one theme each.

# %% tags=["parameters"]
model = "sotu-loop"
text = "The state of our union is strong, and the people of the United States are at peace with the world."
n_loops = 12
seed = 0

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("loopmdm") is None:  # in Colab and the like, from a clone of the repository
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", ".."])

import torch

from loopmdm.analysis import attention_across_loops, explore, figures, read_loops
from loopmdm.model import HookedLoopMDM, Trajectory, list_models, sample

_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## One sentence, half of it hidden, twelve loops
#
# `mask` hides an exact share of the tokens; which ones is a function of the seed. `b` keeps three things together:
# `tokens` (what the model sees), `clean` (what was there) and `masked` (where they differ). `run_with_cache` keeps
# every activation of every loop.

# %%
m = HookedLoopMDM.from_pretrained(model)
b = m.mask(text, ratio=0.5, seed=seed)
logits, cache = m.run_with_cache(b.tokens, n_loops=n_loops)
layer = m.cfg.layers("loop")[0]
print(m.to_string(b.tokens[0]))
attention_across_loops(cache, layer=layer, loops=(0, m.cfg.max_loops - 1, n_loops - 1), order="masked-first")

# %% [markdown]
# Three loops of the looped layer, masked positions first: masked to masked at the top left. Below, any loop, layer
# and head to click through, two settings side by side, and what each loop would answer.

# %%
explore(cache, clean=b)

# %% [markdown]
# ## Open a model
#
# A name is one of the list below, a run folder, or a hub id. `sotu` models read State of the Union addresses,
# `sudoku` models 6x6 Sudoku grids. The last line reads: layers of the prelude, the looped layers that run
# S times, the coda; then the largest S that was drawn in training. At inference any S works.

# %%
print(*list_models(), sep=", ")
m

# %% [markdown]
# ## What is in the cache
#
# Names are TransformerLens' own. A looped layer's names gain the loop as a prefix, and every loop has a hook
# point of its own. With one hook point that fires S times, a cache would keep the last value and the first
# gradient under one name, and say nothing.

# %%
print(cache)
print("one loop:  ", cache["pattern", "loop", 2, layer].shape, "[batch, head, query, key]")
print("all loops: ", cache.stack("pattern", layer=layer).shape, "[loop, batch, head, query, key]")
print("unrolled:  ", cache.unrolled().accumulated_resid().shape, "[virtual layer, batch, pos, d_model]")

# %% [markdown]
# `cache["pattern", "loop", 2, 1]` and `cache["loop.2.blocks.1.attn.hook_pattern"]` are the same entry.
# `cache.unrolled()` is a TransformerLens `ActivationCache` of the model as if it were a deep one, so that
# `decompose_resid` and its relatives work.
#
# One consequence of the architecture is used in all notebooks. Nothing tells a loop its number, and nothing
# tells it how many follow. So the states of a short run are those of a long one, cut short, and one run holds
# the answers of all smaller S.

# %%
short = m.run_with_cache(b.tokens, n_loops=3)[1]
torch.testing.assert_close(short["loop.2.hook_out"], cache["loop.2.hook_out"])
state, context = list(m.states(b.tokens, n_loops))[2]
torch.testing.assert_close(m.readout(state, context), m(b.tokens, n_loops=3))

# %% [markdown]
# ## What would each loop answer?
#
# The coda's read-out after loop *i* is the model at `n_loops = i + 1`. Below, a column is a loop and a row a
# hidden position. Dark: a high probability of the token that was hidden. Outlined: the best token changed in
# this loop. Look for rows that change late, and for rows that were right and are wrong again. (Pictures count
# loops as names and tables do, from 0.)

# %%
readout = read_loops(m, b, n_loops=n_loops)
_ = readout.plot()

# %%
hidden = readout[readout["masked"]]
hidden.groupby("loop")[["p_true", "entropy", "correct", "flipped"]].mean().round(3)

# %% [markdown]
# ## Change one loop, and only that one
#
# A hook is a function of the activation. This one takes the edges from masked queries to *other* masked keys
# out of the first loop. Both runs use the explicit attention path: the fused kernel differs from it in the
# last bits, and a comparison should differ in the intervention alone.


# %%
def cut_masked_to_masked(scores, hook):
    others = b.masked[:, None, :, None] & b.masked[:, None, None, :]
    others = others & ~torch.eye(scores.shape[-1], dtype=torch.bool)
    return scores.masked_fill(others, float("-inf"))


def p_true(logits):
    return logits.softmax(-1).gather(-1, b.clean[..., None])[..., 0][b.masked].mean().item()


place = f"loop.0.blocks.{layer}.attn.hook_attn_scores"
changed = m.run_with_hooks(b.tokens, n_loops=n_loops, attn_path="eager", fwd_hooks=[(place, cut_masked_to_masked)])
intact = m(b.tokens, n_loops=n_loops, attn_path="eager")
print(f"mean p(true) of hidden tokens: {p_true(intact):.3f} intact, {p_true(changed):.3f} with loop 0 cut")

# %% [markdown]
# One sentence decides nothing. What such a cut does on held-out data, and against the right control, is the
# subject of notebook 07.
#
# ## Let it write
#
# A sampler starts from masks and reveals a few positions a step. The three parts are interchangeable: which
# positions, which tokens, how many loops. Here it fills in the sentence from above; `Trajectory` records what
# the model would have said at each loop of some steps.

# %%
trajectory = Trajectory(steps=(0, 4))
s = sample(m, clues=b, steps=8, n_loops=m.cfg.max_loops, order="confidence", seed=seed, callback=trajectory)
for step in (0, 2, 4, 8):
    print(step, m.to_string(s.history[min(step, len(s.history) - 1), 0]))
print(f"{s.forwards} forwards, {s.loops_used.sum()} loops, {s.flops:.2e} FLOPs")

# %%
trajectory.frame().groupby(["step", "loop"])[["p_top1", "entropy", "state_change"]].mean().round(3).head(8)

# %% [markdown]
# ## Try it
#
# 1. Hide one word of your own sentence. In which loop is p(true) highest?
# 2. Cut the edges from masked to masked positions in loop 1 instead of loop 0. Which costs more?
#
# <details><summary>One way</summary>
#
# ```python
# import loopmdm as lm
#
# m = lm.open_model("sotu-loop")
# b = m.mask("The people of the United States are strong and free.", words=["people", "strong"])
# said = lm.read_loops(m, b, n_loops=12)
# print(said[said["masked"]].groupby("loop")["p_true"].mean().idxmax())
#
# for loop in (0, 1):
#     with lm.cut(m, "masked->masked", loops=loop):
#         changed = m(b, n_loops=12)
#     print(loop, lm.compare(m(b, n_loops=12), changed, b)["change"].mean())
# ```
#
# </details>
#
# ## The study in one picture
#
# Every claim of the paper stands beside a number that could have said no: what is measured, the margin, the
# positive control, and what would falsify it (`figures/claims.toml`, which also says what was known when it was
# written). The picture is drawn from the committed tables. *Supported* and *not supported* mean that the whole
# 95% interval lies on one side of the margin, *equivalent* that it lies within a stated slack of it, *undecided*
# none of these; *not testable here* means that a positive control failed, or that these models cannot be asked.
# Where an arm was trained once, the verdict is about that one model.

# %%
figures.FIGURES["claims"].show()

# %% [markdown]
# What each claim would have been falsified by:

# %%
from loopmdm.analysis.exhibits.verdicts import load_claims

for claim in load_claims():
    print(f"{claim.name}: {claim.falsifier}")

# %% [markdown]
# ## Where to go from here
#
# | notebook | question |
# |---|---|
# | 02 training | Does looping save training FLOPs? |
# | 03 inference scaling | Do more loops at inference help, and where? |
# | 04 attention | Do masked positions come to attend to each other? |
# | 05 representation | Do the loops refine and converge? |
# | 06 adaptive stopping | Can a model know when to stop? |
# | 07 interventions | Does the gain go through the edges among masked positions? |
# | 08 Sudoku and known answers | What does a loop do, where an exact algorithm says what should be done? |
# | 09 bring your own model | The same with other weights, texts, measures and rules |
# | 10 other people's models | What of it can be asked of models that others trained? |
# | 11 what a loop does | One Sudoku from clues to solution, with the instruments of interpretability |
#
# ## Limits
#
# The models have about a million parameters or fewer, one looped layer, and two kinds of data. What is false
# here may be true at the paper's scale, and the other way round. A figure shows what was measured, also where
# it contradicts the paper; when models are trained again the figures change, and the text beside them says
# what to look for rather than what to find.

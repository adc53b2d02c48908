# %% [markdown]
# # Attention across loops
#
# A looped masked-diffusion language model runs its middle layers several times with the same weights.
# The paper behind it (*Looped Diffusion Language Models*, arXiv 2605.26106) says that this works because
# **masked positions interact**: with more loops, masked positions attend more to other masked positions,
# up to the number of loops used in training.
#
# This notebook walks the way an interested researcher would: open a model, look at its attention maps
# after each loop, read what each loop would answer, change one loop and see what breaks, and then
# measure the claim on held-out data. The definitions are ours, since the paper's are not public, and all
# models here are small ones that we trained (one seed each): what you see is a fact about *them*.

# %% tags=["parameters"]
model = "sotu-loop"
text = "The state of our union is strong, and the people of the United States are at peace with the world."
n_loops = 12
seed = 0

# %%
import torch

from analysis import attention_across_loops, figures, mask_attention, read_loops, representation_change
from loopmdm_model import HookedLoopMDM, LoopMDM, mask_tokens

_ = torch.set_grad_enabled(False)

# %%
m = HookedLoopMDM.from_pretrained(model)
m

# %% [markdown]
# The model's line reads: one prelude layer, one looped layer run S times, then the coda. `S_max` is the
# largest S seen in training; at inference any S works. Layers keep their physical number everywhere:
# layer 1 is the looped one.
#
# ## Hide half of a sentence
#
# `mask` hides an exact share of the tokens, chosen by seed. `[MASK]` is always the last id.

# %%
b = m.mask(text, ratio=0.5, seed=seed)
print(m.to_string(b.tokens[0]))

# %% [markdown]
# ## Run it and keep everything
#
# Names follow TransformerLens; a looped layer's names gain the iteration as a prefix. Each iteration has
# its own hook point, so values and gradients of different loops never overwrite each other.

# %%
logits, cache = m.run_with_cache(b.tokens, n_loops=n_loops)
layer = m.cfg.layers("loop")[0]
print(cache)
print("loop.2.blocks.1.attn.hook_pattern" in cache, cache["pattern", "loop", 2, layer].shape)
print("all loops:", cache.stack("pattern", layer=layer).shape, "[loop, batch, head, query, key]")
print("as a deep model:", cache.unrolled().accumulated_resid().shape, "[virtual layer, batch, pos, d_model]")

# %% [markdown]
# ## The same head, after one loop and after many
#
# Nothing in the model tells a loop its number, so the map at loop *i* is the same for every run with more
# than *i* loops: one run holds all smaller ones. `head="auto"` picks the head that changes most. That is a
# choice made on what it shows: fine for looking, not for testing.

# %%
attention_across_loops(cache, layer=layer, loops=(0, m.cfg.max_loops - 1, n_loops - 1))

# %% [markdown]
# Put the masked positions first and the four blocks of the map become the four group pairs: masked to
# masked at the top left, masked to clean at the top right.

# %%
attention_across_loops(cache, layer=layer, loops=(0, m.cfg.max_loops - 1, n_loops - 1), order="masked-first")

# %% [markdown]
# ## What would each loop answer?
#
# The coda's read-out after loop *i* **is** the model with `n_loops = i + 1`. Dark cells: the hidden token
# has a high probability. Outlined: the best token changed at this loop.

# %%
readout = read_loops(m, b, n_loops=n_loops)
readout.plot()

# %%
hidden = readout[readout["masked"]]
hidden.groupby("loop")[["p_true", "entropy", "correct", "flipped"]].mean().round(3)

# %% [markdown]
# ## Change one loop
#
# A hook is a function of the activation. This one removes the edges from masked queries to *other* masked
# keys in the first loop only. Both runs are pinned to the explicit attention path: fused and explicit
# attention differ in the last bits, and a comparison should differ in the intervention alone.


# %%
def cut_masked_to_masked(scores, hook):
    others = b.masked[:, None, :, None] & b.masked[:, None, None, :]
    others = others & ~torch.eye(scores.shape[-1], dtype=torch.bool)
    return scores.masked_fill(others, float("-inf"))


place = f"loop.0.blocks.{layer}.attn.hook_attn_scores"
cut = m.run_with_hooks(b.tokens, n_loops=n_loops, attn_path="eager", fwd_hooks=[(place, cut_masked_to_masked)])
intact = m(b.tokens, n_loops=n_loops, attn_path="eager")


def p_true(logits):
    return logits.softmax(-1).gather(-1, b.clean[..., None])[..., 0][b.masked].mean().item()


print(f"mean p(true) at hidden positions: intact {p_true(intact):.3f}, loop 1 cut {p_true(cut):.3f}")

# %% [markdown]
# One sentence decides nothing. The measures below run on held-out text.
#
# ## Measure it
#
# For every layer application and head, `mask_attention` gives the mean attention mass between the groups,
# its chance level, and the log-odds of a masked against a clean key (0: the head does not care). It reduces
# while the model runs, so memory does not grow with the number of loops.

# %%
from loopmdm_model.data.batches import spread
from loopmdm_model.evaluation import load_test_set

test = load_test_set(m.record["spec"]["data"]["corpus"], m.cfg.n_ctx, m.tokenizer)
batch = mask_tokens(spread(test.tokens, 32), m.cfg.mask_token_id, mask_ratio=0.5, seed=seed)
table = mask_attention(m, batch, n_loops=n_loops, by_head=False)
looped = table.query("segment == 'loop' and query_group == 'masked' and key_group == 'masked'")
looped[["loop", "mass", "chance", "lift", "log_odds", "log_odds_se", "content", "n"]].round(3)

# %% [markdown]
# An untrained model of the same shape is the control: whatever it shows is not learnt.

# %%
torch.manual_seed(seed)
untrained = mask_attention(HookedLoopMDM(LoopMDM(m.cfg)), batch, n_loops=n_loops, by_head=False)
control = untrained.query("segment == 'loop' and query_group == 'masked' and key_group == 'masked'")
control[["loop", "mass", "chance", "log_odds", "log_odds_se"]].round(3)

# %% [markdown]
# ## Does the state settle?
#
# States grow from loop to loop, so a falling *relative* change proves nothing by itself: a constant drift
# gives 1/i. Read the first column beside the second.

# %%
change = representation_change(m, batch, n_loops=n_loops)
masked = change[change["token_group"] == "masked"].pivot(index="loop", columns="metric", values="value")
masked[["relative_change", "drift_null", "step_cosine", "kl_previous", "top1_flips"]].round(3)

# %% [markdown]
# ## The figures
#
# These are the figures that `make figures` writes, drawn from the same committed tables. The first is the
# paper's claim about attention, for a task that needs depth (Sudoku) and for text.

# %%
claim = figures.FIGURES["mask-to-mask-by-loop"]
print(claim.text)
claim.draw()

# %%
figures.FIGURES["representation-change"].draw()

# %% [markdown]
# Attention is a map, not an effect. Whether more loops *help* is a question of likelihood and of solved
# puzzles:

# %%
quality = figures.FIGURES["nll-by-loops"]
print(quality.text)
quality.draw()

# %%
figures.FIGURES["sudoku-solve-rate"].draw()

# %% [markdown]
# ## What this shows, and what would falsify it
#
# Read the panels, not this text, for the numbers. What to look for:
#
# * *The claim about attention* stands for a model if the log-odds (and not only the mass) of masked keys
#   rise over the loops to about S_max. A flat or falling curve counts against it. A first loop that differs
#   from the rest is no rise.
# * *The claim about quality* stands if NELBO falls with S and the looped model ends below its non-looped
#   twin at S = 1. Where the twin is better, looping did not pay at this size and budget.
# * *Mass is not communication.* All [MASK] embeddings are equal, so in layer 0 attending to masked keys
#   moves no content (see `content`). Cutting edges, not looking at them, tells what they carry.
#
# Limits: one seed of training, small models, one corpus and one puzzle; intervals are over test items,
# not over training runs.

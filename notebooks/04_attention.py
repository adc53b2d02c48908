# %% [markdown]
# # Do masked positions come to attend to each other?
#
# The paper explains looping by attention: with more loops, masked positions attend more to other masked
# positions, and this saturates near the number of loops used in training. It does not say, in what is public,
# how "attend more" is measured: over which layers and heads, with or without a position's own key, against
# which chance level. So this notebook measures it in several ways, and asks how much hangs on the choice.
#
# What would count against the claim: a measure that is flat or falls over the loops; a rise that an untrained
# model, or a model looped without training for it, shows as well; a rise that goes on unchanged beyond S_max;
# or a rise under one definition where another falls. And even a true rise is a map, not an effect: what the
# edges carry is asked by cutting them (notebook 07).

# %% tags=["parameters"]
model = "sotu-loop"
text = "The state of our union is strong, and the people of the United States are at peace with the world."
n_loops = 12
n = 32
seed = 0

# %%
import pandas as pd
import torch

from loopmdm.analysis import Case, attention_across_loops, by_loop, claims_table, explore, figures, mask_attention
from loopmdm.analysis.measures.attention import head_growth
from loopmdm.analysis.measures.attention.cards import head_cards
from loopmdm.analysis.measures.mechanism import edge_effects
from loopmdm.model import HookedLoopMDM, LoopMDM

_ = torch.set_grad_enabled(False)
case = Case.of(model, n_loops, n, seed)
m, layer = case.m, case.m.cfg.layers("loop")[0]
loops = (0, m.cfg.max_loops - 1, n_loops - 1)
m

# %% [markdown]
# ## Maps side by side
#
# Nothing tells a loop its number, so the map at loop *i* is the same in every run with more than *i* loops.
# `head="auto"` picks the head that changes most. That is a choice made on what it shows: fine for looking, not
# for testing.

# %%
b = m.mask(text, ratio=0.5, seed=seed)
logits, cache = m.run_with_cache(b.tokens, n_loops=n_loops)
attention_across_loops(cache, layer=layer, loops=loops)

# %% [markdown]
# Put the masked positions first, and the four blocks of a map become the four group pairs: masked to masked at
# the top left, masked to clean at the top right.

# %%
attention_across_loops(cache, layer=layer, loops=loops, order="masked-first")

# %% [markdown]
# The same run to click through, in a frame: any loop, layer and head, and what each loop would answer.

# %%
explore(cache, clean=b)

# %% [markdown]
# Maps from a test block, drawn by seed before looking:

# %%
figures.FIGURES["attention-maps"].show()

# %% [markdown]
# ## Mass, log-odds, content
#
# For each application and head, `mask_attention` reduces the pattern while the model runs; memory does not
# grow with S. For masked queries and a group of keys (other masked ones, clean ones, itself):
#
# * **mass** is the attention that goes to the group; the three sum to 1. **chance** is the group's share of
#   the keys, what uniform attention would give, and **lift** is the one over the other.
# * **log_odds** compares a masked with a clean key, one against one, self left out. 0: the head does not care.
#   It is one number for a group of queries, and stands in its row of masked keys.
#   At a fixed mask ratio lift is only rescaled mass; the log-odds do not depend on how many keys there are.
# * **content** is what the attention moves: the norm of the part of the head's output that differs between
#   the keys. All [MASK] embeddings are equal, so early masked keys have little to say, however much mass they
#   get.

# %%
halves = case.masked(0.5)
looped = "segment == 'loop' and query_group == 'masked' and key_group == 'masked'"
table = mask_attention(m, halves, n_loops=n_loops, by_head=False, clusters=case.clusters)
columns = ["loop", "mass", "chance", "lift", "log_odds", "log_odds_se", "content", "n"]
table.query(looped)[columns].round(3)

# %% [markdown]
# `by_loop` turns one column of such a frame into a table, a column a loop:

# %%
by_loop(table, "mass").round(3)

# %% [markdown]
# An untrained model of the same shape is the first control: whatever it shows is not learnt.

# %%
torch.manual_seed(seed)
untrained = mask_attention(HookedLoopMDM(LoopMDM(m.cfg)), halves, n_loops=n_loops, by_head=False)
untrained.query(looped).query("loop in @loops")[columns].round(3)

# %% [markdown]
# The figure puts both tasks on the whole test sample. Look first at the log-odds (b, e), then at the
# mass (a, d), and ask where a rise ends: near the dash-dotted line, before it, or not at all. Panels c and f
# show the layers outside the loop, which do not loop and yet have a preference of their own.

# %%
figures.FIGURES["mask-to-mask-by-loop"].show()

# %% [markdown]
# ## Does it end where training ended?
#
# "Saturates near S_max" could mean that training up to S_max sets the place, or that a few loops are always
# enough. Models that were trained with another S_max tell the two apart: in the first case their curves turn at
# different loops in panel a, and all near 1 in b.

# %%
figures.FIGURES["saturation"].show()

# %% [markdown]
# ## What the attention moves
#
# Mass is not communication. If log-odds rise while content falls, masked positions look at each other more and
# tell each other less.

# %%
figures.FIGURES["attention-content"].show()

# %% [markdown]
# Panels b and d leave the test set: there the masks are those of the model's own sampling run, where what is
# still hidden is no random choice. The same, live, for a short run; in the first step nothing is clean, and
# the log-odds do not exist.

# %%
parts = [
    mask_attention(m, seen, n_loops=n_loops, by_head=False).query(looped).assign(step=step)
    for step, seen in case.along_sampling(8)
]
sampled = pd.concat(parts).query("loop in @loops")
sampled.pivot(index="step", columns="loop", values="log_odds").round(3)

# %% [markdown]
# ## Every reasonable definition
#
# Mass, lift, log-odds, content, one key toggled between masked and clean; self in or out; sinks in or out;
# heads averaged, weighted, or the most favourable one; three mask ratios. The specification curve draws the
# rise from the first loop to S_max under each, a row a measure. Look for where the sign changes: on one side of
# that line the claim holds for these models, on the other it does not, and the choice between them is the
# reader's.

# %%
figures.FIGURES["specification-curve"].show()

# %% [markdown]
# ## Which heads?
#
# A mean over heads can hide that one head turns to masked keys and another away. To name heads without being
# flattered by the choice, they are ranked on one half of the sequences and measured on the other.
# `growth_ranked` chose, `growth` tests; the p-values are one-sided and corrected over the heads (Holm).

# %%
heads = head_growth(m, halves, m.cfg.max_loops, clusters=case.clusters, seed=seed)
heads[["layer", "head", "rank", "growth_ranked", "growth", "standard_error", "p_holm", "n"]].round(3)

# %%
figures.FIGURES["attention-heads"].show()

# %% [markdown]
# A card says of each head where it looks and what that does: on a board, whether it lowers the symbols of the
# clues it reads; on text, whether it copies, repeats or rests on a sink. A label is by rule, and an untrained
# twin gets hardly any.

# %%
cards = head_cards(m, halves.rows(slice(8)), m.cfg.max_loops)
cards.query("loop in @loops")[["loop", "layer", "head", "label", "effect"]].drop_duplicates()

# %% [markdown]
# ## Who tells whom
#
# The measure that mass stands in for: change one clean word, and let the edges of one group alone, in one loop
# alone, carry what changed. What the answer then moves by is what these edges said. Thousandths of a nat, by the
# distance of the key and by what it holds; chapter 11 takes this apart and draws it.

# %%
said = edge_effects.edge_effects(m, halves.rows(slice(4)), 2)
said = said.query("method == 'exact' and metric == 'kl' and queries == 'masked'")
(1000 * said.pivot_table("value", ["keys", "relation"], "loop")).round(2)

# %% [markdown]
# ## Try it
#
# 1. Is a Sudoku model's rise still there with three quarters masked instead of half?
# 2. Which head of the looped layer has the largest log-odds in the last loop, and what does its card say?
#
# <details><summary>One way</summary>
#
# ```python
# import loopmdm as lm
#
# m = lm.open_model("sudoku-loop-s4")
# case = lm.Case.of(m, n=16)
# looped = "segment == 'loop' and query_group == key_group == 'masked'"
# for ratio in (0.5, 0.75):
#     df = lm.mask_attention(m, case.masked(ratio), n_loops=4, by_head=False).query(looped)
#     print(ratio, df["log_odds"].round(2).tolist())
#
# heads = lm.mask_attention(m, case.masked(0.5), n_loops=4).query(looped).query("loop == 3")
# print(heads.set_index("head")["log_odds"].idxmax())
# cards = lm.head_cards(m, case.masked(0.5), n_loops=4)
# print(cards.query("loop == 3")[["head", "label", "effect"]].drop_duplicates())
# ```
#
# </details>
#
# ## Verdicts

# %%
mine = ["mask-to-mask-rises", "mask-to-mask-saturates", "saturation-follows-s-max", "content-rises"]
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=3)

# %% [markdown]
# ## Limits
#
# A rise in a looped model is evidence about training with loops only if it is absent where nobody trained for
# it; notebook 07 shows the same measure on base models whose middle layer is simply repeated. A first loop
# that differs from the rest is no rise: read the whole curve. One looped layer of four heads is little to
# average over. The definitions are ours.

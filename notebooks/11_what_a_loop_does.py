# %% [markdown]
# # What does a loop do?
#
# Attention mass says where a head looks, not what it is told, nor whether that matters. Here is one Sudoku from
# clues to solution with the instruments that interpretability people expect, each with a loop index: what a cell
# still considers, who writes the answer, what a changed clue does and by which way, which head says what, what
# can be read off a state, and what a push does.
#
# Each of them can mislead, so each is tried first on `naked_singles`, a transformer whose weights were set by
# hand: one loop is one round of naked singles, and nothing else. What a method says of it can be checked.

# %% tags=["parameters"]
model = "sudoku-loop-s4"
n = 48
n_clues = 16
seed = 0

# %%
import pandas as pd
import torch

from loopmdm.analysis import Case, Dictionary, candidates, claims_table, example_board, figures, head_cards
from loopmdm.analysis.measures.mechanism import attribution, attribution_patching, corruption, edge_effects
from loopmdm.analysis.measures.mechanism import steering as pushes
from loopmdm.analysis.measures.mechanism.dictionaries import feature_pages
from loopmdm.analysis.plots.candidates import plot_candidates
from loopmdm.model.planted import naked_singles
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

_ = torch.set_grad_enabled(False)

# %%
case = Case.of(model, n=n, seed=seed)
m, board = case.m, BOARDS[case.test.task]
b = puzzles(board, case.tokens, n_clues, unique=True, seed=seed)
planted = naked_singles(board)
S = m.cfg.max_loops
m

# %% [markdown]
# ## What each cell still considers
#
# After every loop the read-out gives each hidden cell a distribution over symbols: its pencil marks. The last
# panel is what constraint propagation has after as many rounds. The board is chosen by rule, not by hand.

# %%
_ = plot_candidates(example_board(m, b, kind="solved late"))

# %%
figures.FIGURES["pencil-marks"].show()

# %% [markdown]
# A symbol that round *r* of naked singles excludes should die in loop *r*. In the planted model it does, exactly:
# slope 1. Against another board's candidates there is nothing to find.


# %%
def slopes(each, S):
    found = candidates(each, b, S)
    return found[(found["metric"] == "slope") & (found["rule"] == "naked singles")].set_index("arm")["value"]


pd.DataFrame({"planted": slopes(planted, 6), model: slopes(m, S)}).round(2)

# %%
figures.FIGURES["candidates"].show()

# %% [markdown]
# In panel a the mass should run down the framed diagonal, and does so loosely: much of what round 1 excludes is
# gone in the first loop already. In panel c the runs cluster near 1 with one that does not, the run that hardly
# left its plateau.
#
# ## Is the state the candidate set?
#
# Swap the states of hidden cells with cells of other boards. If only the candidates mattered, a cell with the
# same ones would serve as well.

# %%
figures.FIGURES["scrubbing"].show()

# %% [markdown]
# Same candidates cost least by far, and the best round rises with the loop, about one round in two loops. But the
# cost is never 0: the state holds more than the set.
#
# ## Who writes the answer
#
# The logit difference, true less best wrong symbol, is a sum over what heads and MLPs write in each loop, if the
# final norm is held at its scale. In the planted model only MLPs write it, the first layer's candidates, the
# second layer's symbols; its heads write how often a symbol is taken, which no logit reads.

# %%
half = case.masked(0.5)
told = attribution.logit_attribution(planted, half, 3, reads=("direct",))
parts = told.groupby(["part", "layer", "loop"], dropna=False)["value"].sum().round(3)
parts[parts != 0]

# %%
figures.FIGURES["logit-attribution"].show()

# %% [markdown]
# ## One clue changes
#
# A clue gets another symbol that no other clue forbids. Which activations carry the change to the answer? Exact:
# put the corrupted run's activation into the clean run, one at a time. By gradient: all of them from one
# backward.

# %%
few = half.rows(slice(16))
other = corruption.corrupted(m, few, seed=seed)
effects, _ = attribution_patching.attribution_patching(m, few, other, n_loops=S)
found = effects.frame().query("place == 'all' and component == 'mlp_out'")
found[["segment", "loop", "layer", "value", "standard_error", "n"]].round(3)

# %%
figures.FIGURES["attribution-patching"].show()

# %% [markdown]
# A changed token is no small step for the prelude: there the gradient has the wrong sign. In the loops the order
# is the same and most signs are, but the gradient says less than half of what patching shows.
#
# ## Who tells whom
#
# Edges carry keys and values. In one loop let the edges of a group carry those of the corrupted run, all else
# clean: what the answer loses is what they said. In the planted model cells without a common unit say nothing.

# %%
columns = ["loop", "relation", "keys", "value", "standard_error"]
said = edge_effects.edge_effects(planted, half.rows(slice(8)), 2)
said = said.query("method == 'exact' and metric == 'kl' and queries == 'masked'")
said[columns].round(4)

# %%
figures.FIGURES["who-tells-whom"].show()

# %% [markdown]
# On Sudoku clues speak in every loop and hidden cells mostly in the last two, nearly all within units. On text one
# changed word is heard next door in the first loop, and then hardly any more.
#
# ## Which head does what

# %%
cards = head_cards(m, few, S)
cards.query("metric == 'now' and of == 'clean'")[
    ["loop", "head", "label", "effect", "value", "standard_error"]
].round(2)

# %%
figures.FIGURES["head-cards"].show()

# %% [markdown]
# Read "now" before "direct": full attention never happens, and later loops repair what one head's absence breaks
# ("removed" is near 0).
#
# ## What can be read off, and what a push does

# %%
figures.FIGURES["probes"].show()

# %%
figures.FIGURES["learned-lenses"].show()

# %%
boards = puzzles(board, case.tokens[:16], 14, unique=True, seed=seed)
directions = pushes.symbol_directions(m, boards, S, names=("unembedding",), seed=seed)
pushed = pushes.steering(m, boards, directions, kind="open", strengths=(2.0,), seed=seed)
pushed.query("metric in ('follows', 'felt')")[["direction", "loop", "metric", "value", "standard_error"]].round(2)

# %%
figures.FIGURES["steering"].show()

# %%
figures.FIGURES["perturbation-gain"].show()

# %% [markdown]
# A push at one cell reaches its peers six times as much as other cells in the first loop; in an untrained twin
# all alike. It grows from loop to loop: no loop contracts.
#
# ## One dictionary for all loops

# %%
figures.FIGURES["dictionaries"].show()

# %% [markdown]
# A crosscoder's features are born in the first loop and last to the end: one code for all loops hides what
# changes. An SAE has a code at each loop, and on Sudoku two thirds of its features begin later; but so do those of
# an untrained twin: births alone do not show that anything is computed. Nor does fidelity: a crosscoder rebuilds
# the untrained twin on Sudoku as well.
#
# Two models are shipped with an SAE, one set of features for all loops, and its record. A page of a feature: at
# which loops it is active, which variable of the task it follows best on sequences that did not choose it, where
# it is largest, and what the answer loses when it is taken out there.

# %%
solver = Case.of("sudoku-loop", n=n, seed=seed)
dictionary = Dictionary.from_pretrained("sudoku-loop", solver.m)
kept = dictionary.origin.told["scores"]
pd.DataFrame(
    {(arm, what): kept[arm][what]["value"] for arm in kept for what in ("explained_variance", "born", "last")}
)

# %%
feature_pages(dictionary, solver.m, solver.masked(0.5), 3)[0]

# %% [markdown]
# ## Try it
#
# 1. Take the looped layer out in one loop, on distribution. Which loop is missed most?
# 2. Push all cells along one direction after the first loop, and after the last. What is left of it at the end?
#
# <details><summary>One way</summary>
#
# ```python
# import loopmdm as lm
#
# m = lm.open_model("sudoku-loop-s4")
# b = lm.Case.of(m, n=16).masked(0.5)
# by = lm.Reference.mean(m, b, n_loops=4)
# for loop in range(4):
#     with lm.skip(m, loops=loop, by=by):
#         changed = m(b, n_loops=4)
#     print(loop, lm.compare(m(b, n_loops=4), changed, b)["change"].mean())
#
# wrong = m.W_U[:, 0] - m.W_U[:, 1]
# for loop in (0, 3):
#     with lm.steer(m, 4 * wrong / wrong.norm(), loops=loop):
#         changed = m(b, n_loops=4)
#     print(loop, lm.compare(m(b, n_loops=4), changed, b)["kl"].mean())
# ```
#
# </details>
#
# ## Verdicts

# %%
mine = [
    "loops-exclude-as-propagation",
    "relays-are-hidden",
    "heads-say-what-is-taken",
    "later-loops-carry-a-change",
]
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
verdicts[["verdict", "estimate", "low", "high", "unit", "margin", "n_seeds", "why"]].style.format(precision=4)

# %% [markdown]
# ## Limits
#
# A model that answers at once what it can answer is near the last round from the first loop on, whatever it does
# inside. Patching and swapping push a model off its distribution; what they cost bounds what they show. The best
# wrong token is chosen for its luck, which biases attributions downwards on text: compare with a random one. One
# run is taken apart in most pictures; verdicts are over seeds.

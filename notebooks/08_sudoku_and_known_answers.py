# %% [markdown]
# # Sudoku and other tasks with known answers
#
# On a puzzle one can say what a loop *should* do. The paper reads its boards so: early loops are locally
# plausible and globally inconsistent, later loops repair them; and looping matters most where the model may not
# choose the order in which it fills.
#
# Both can fail. Loops may break as many cells as they repair. A board's errors may be local throughout: a hidden
# cell that repeats a clue is seen at a glance, two hidden cells that clash take masked positions that agree. And
# a restricted order may gain no more from looping than the free one does. The puzzles (6x6) and the protocol
# are ours.
#
# The last sections leave puzzles for three tasks whose exact answers can be computed: two that need hidden
# positions to inform each other and one that does not.

# %% tags=["parameters"]
model = "sudoku-loop"
base = "sudoku-base"
tree = "tree-loop"
arithmetic = "arithmetic-loop"
n_clues = 14
n = 48
seed = 0

# %%
import pandas as pd
import torch

from loopmdm.analysis import Case, candidates, claims_table, example_board, figures, measure, tables
from loopmdm.analysis.measures import known
from loopmdm.analysis.plots.candidates import plot_candidates
from loopmdm.model.tasks.propagation import propagate
from loopmdm.model.tasks.puzzles import puzzles
from loopmdm.model.tasks.sudoku import BOARDS

_ = torch.set_grad_enabled(False)
case = Case.of(model, n=n, seed=seed)
m, board = case.m, BOARDS[case.test.task]
n_loops = max(6, m.cfg.max_loops)
m

# %% [markdown]
# ## One puzzle
#
# A grid of a class that training never saw, dug until few clues are left and still only one solution. All
# hidden cells are filled at once, each with its best symbol, after every loop. Which puzzle is shown is the
# choice of the seed; it is an illustration. Marks: `x` differs from the solution.

# %%
one = puzzles(board, case.tokens[:1], n_clues, unique=True, seed=seed)
filled = known.boards_after_loops(m, one, n_loops)[:, 0]


def lines(cells, solution=None):
    symbols = [str(int(cell) + 1) if int(cell) < board.size else "." for cell in cells]
    wrong = [False] * board.n_cells if solution is None else (cells != solution).tolist()
    marked = [symbol + ("x" if bad else " ") for symbol, bad in zip(symbols, wrong, strict=True)]
    return ["".join(marked[row * board.size : (row + 1) * board.size]) for row in range(board.size)]


# %%
shown = {"puzzle": lines(one.tokens[0]), "solution": lines(one.clean[0])}
for loop in (0, 1, 2, n_loops - 1):
    shown[f"after loop {loop}"] = lines(filled[loop], solution=one.clean[0])
for names in (list(shown)[:3], list(shown)[3:]):
    print("    ".join(f"{name:14s}" for name in names))
    for row in zip(*(shown[name] for name in names), strict=True):
        print("    ".join(f"{part:14s}" for part in row))
    print()
print("wrong cells after each loop:", *(filled != one.clean[0]).sum(1).tolist())

# %% [markdown]
# ## How deep is a cell?
#
# A solver that only propagates constraints works in rounds: in each it fills every cell that has one candidate
# left, or holds the only place for a symbol. The round in which a cell falls is its depth; -1 means that it
# takes search.

# %%
reached = propagate(board, one.tokens)
pd.DataFrame(reached.depth.view(board.size, board.size).numpy())

# %% [markdown]
# ## Many boards
#
# `clue_conflicts` is the share of pairs of a hidden cell and a clue in one unit that hold the same symbol;
# `guess_conflicts` the same for pairs of hidden cells. `plausible_invalid` counts boards without any conflict
# with their clues that are wrong all the same: the paper's "locally plausible, globally inconsistent".

# %%
b = puzzles(board, case.tokens, 20, unique=True, seed=seed)
by_loop = known.boards_by_loop(m, b, n_loops)
table = by_loop.pivot(index="loop", columns="metric", values="value").round(3)
table[["clue_conflicts", "guess_conflicts", "plausible_invalid", "wrong", "repaired", "broken", "valid"]]

# %%
figures.FIGURES["sudoku-boards"].show()

# %% [markdown]
# In panel a look at which kind of conflict goes first. In b look at the distance between repaired and
# broken cells, and beyond S_max: where the two meet, further loops only shuffle.
#
# ## Settling against depth
#
# If a loop were a round of propagation, deep cells would settle late.

# %%
depths = known.settling_by_depth(m, b, n_loops)
depths["loop_settled"] = depths["loop_settled"].astype(object).where(depths["loop_settled"].notna(), "never")
depths.pivot(index="depth", columns="loop_settled", values="share").round(2)

# %% [markdown]
# The rank correlation is taken within a puzzle. *Shuffled* is what no relation gives. *Given candidates* takes
# out that easy cells are both shallow and quick: what is left is what depth adds. And a model without loops has
# a correlation, too: its shallow cells are right, its deep ones never are. So the base model stands beside, with
# its one loop.

# %%
runs = {"looped": (m, n_loops), "base": (Case.of(base).m, 1)}
found = {name: known.settling_correlation(each, b, loops, seed=seed) for name, (each, loops) in runs.items()}
pd.concat(found).droplevel(1)[["arm", "correlation", "low", "high", "n"]].round(3)

# %% [markdown]
# The looped models of all seeds, on the larger sample:

# %%
depth = tables.load("sudoku-depth").query("arm != 'shuffled'")
depth.pivot_table(index="model", columns="arm", values="correlation").round(3)

# %% [markdown]
# Settling looks at one symbol a cell. The read-out holds more: which symbols a cell still considers, against
# what propagation has left after as many rounds.

# %%
_ = plot_candidates(example_board(m, b, kind="solved late"))

# %%
found = candidates(m, b, n_loops)
found.query("metric == 'slope'")[["rule", "arm", "value", "standard_error", "n"]].round(3)

# %% [markdown]
# ## The order of filling
#
# One cell a step, always with the best symbol: by confidence (the model chooses), row by row, hardest first, or
# all at once. Any valid completion counts. `contrast` is the gain from looping in an order, less the same by
# confidence, paired by puzzle. Where the free order has no room left to gain, the contrast can hardly but be
# positive; the puzzles have few clues for this reason.

# %%
hard = puzzles(board, case.tokens[:24], 10, seed=seed)
counts = (1, n_loops)
effects = known.order_interaction(m, hard, counts, orders=("row-major", "one-shot"))
effects.rates.pivot(index="order", columns="n_loops", values="solve_rate").round(2)

# %%
effects.contrasts[["order", "gain", "reference_gain", "contrast", "low", "high", "n"]].round(3)

# %%
figures.FIGURES["sudoku-orders"].show()

# %% [markdown]
# ## Rounds of belief propagation
#
# `tree` draws the variables of a binary tree whose leaves are observed. Belief propagation gives the exact
# posterior of a hidden node, and says how many rounds of messages it needs (*hops*). `markov` is a chain: there
# a hidden node needs only its nearest clean neighbours, so exchange among masked positions is unnecessary. It is
# the negative control.
#
# Is loop *i* round *i*? Below: the KL from the belief after each round to the read-out after each loop. If loops
# were rounds, the smallest number of each row would move right as one goes down.

# %%
other = Case.of(tree, n=64, seed=seed)
given = other.m, other.masked(0.5), other.test.task, other.m.cfg.max_loops
known.belief_rounds(*given).pivot(index="loop", columns="round", values="kl").round(3)

# %%
nearest = known.best_rounds(*given)
nearest[["loop", "best_round", "kl", "second_round", "gap", "gap_se", "share", "n"]].round(4)

# %% [markdown]
# `gap` says by how much the second best round is worse; `share`, how many sequences agree. A model that has
# learnt the task in its first loop is nearest to the last round from the start: then there are no rounds to
# see, whatever the loops do.

# %%
figures.FIGURES["excess-kl"].show()

# %% [markdown]
# In panels a and c compare the columns with the first one, the base model, before reading them against each other.
# In b look for the diagonal, and in d for its absence.
#
# ## Steps of evaluation
#
# `arithmetic` writes trees of + - * modulo 7 with the value of every operator: `3 4 * 5 2 6 - 3 + 1`. Leaves and
# operators are given, values are hidden. Each follows from the others in a known number of steps, so one can
# ask how far a loop carries the computation. Rows: steps that a hidden value takes; columns: loops run; numbers:
# KL from the exact answer, nats. If a loop did a step, the border between small and large would run down a
# diagonal.

# %%
steps = measure("excess-kl", arithmetic, n_loops=[1, 2, 3, 4, 6, 8], n_samples=1)
steps.query("n_nodes >= 10").pivot(index="hops", columns="n_loops", values="excess_kl").round(2)

# %%
figures.FIGURES["arithmetic-steps"].show()

# %% [markdown]
# By which edges do the later steps come? A deep value's operands are hidden values themselves; its operators and
# leaves are clean. Below, masked queries of the looped layer cannot see masked keys, or clean ones, from the
# second loop on. If loops hand results on, the line without masked keys goes back to that of one loop; if they
# only read the clean tokens again, the other one does.

# %%
figures.FIGURES["arithmetic-edges"].show()

# %% [markdown]
# ## Verdicts

# %%
mine = ["later-loops-repair", "restricted-orders-need-loops"]
mine += ["loop-is-a-round-of-belief-propagation", "one-step-a-loop", "later-steps-come-by-masked"]
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=3)

# %% [markdown]
# ## Limits
#
# Of a task with a known answer one may conclude that a model *matches* an algorithm step by step, not that it
# runs it. 6x6 is small: the deepest chains are short, and a model may know patterns of whole boxes. What the
# paper means by a restricted order is not public. A cell that is right is not a cell that was derived. Averages
# run over boards; a few boards that never settle can carry them.

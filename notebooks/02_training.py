# %% [markdown]
# # Does looping save training compute?
#
# The paper's first claim is about cost: a looped model reaches the likelihood of its non-looped twin with two
# to three times fewer training FLOPs, and ends below it when both may spend the same. A looped step is dearer,
# since the looped layers run S times. So equal *steps* would flatter the looped model, and equal *FLOPs* is
# the fair budget: the looped model gets fewer steps.
#
# The claim would be false for these models if the looped arm needed as many FLOPs as its twin or more, or
# never got there; or if it ended above the twin at equal FLOPs. A deeper non-looped model is the harder
# opponent: it spends what the looped model spends in a step on weights of its own.

# %% tags=["parameters"]
looped = "sudoku-loop"
others = ("sudoku-base", "sudoku-deep", "paper-owt-base", "paper-owt-loop")
flops = 1e11
seed = 0

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch

from loopmdm.analysis import claims_table, figures, tables
from loopmdm.model import HookedLoopMDM, LoopMDM, nelbo
from loopmdm.model.flops import flops_per_token
from loopmdm.model.training.budget import plan
from loopmdm.model.training.spec import RunSpec
from loopmdm.model.training.trainer import Trainer

specs = tables.figures_folder() / "specs"

# %% [markdown]
# ## From a spec to a run
#
# A run is a TOML file: data, model, budget, how S is drawn. Unknown keys are refused.

# %%
print((specs / f"{looped}.toml").read_text())

# %% [markdown]
# ## What counts as equal FLOPs
#
# FLOPs are counted from the shapes: 2mnk for a matrix product, attention scores and values included, embedding
# look-ups free; a training step costs three forwards. With S uniform on 1 to S_max a looped step costs, on
# average, (E[S] - 1) times the looped layers more. `plan` walks through a spec's budget and says how many
# steps that leaves. The next table is what `loopmdm train SPEC.toml --dry-run` prints for one spec; the
# paper's own sizes are specs, too.


# %%
def dry_run(name):
    spec = RunSpec.load(specs / f"{name}.toml")
    with torch.device("meta"):
        parameters = LoopMDM(spec.config).n_parameters
    planned, cfg = plan(spec), spec.config
    return {"spec": name, "parameters": f"{parameters / 1e6:.2f} M", "layers stored": cfg.n_layers,
            "S_max": cfg.max_loops, "E[S]": round(planned.e_s, 2), "steps": planned.steps,
            "FLOPs": f"{planned.flops:.3g}", "tokens": f"{planned.tokens:.3g}",
            "FLOPs a token at S_max": f"{flops_per_token(cfg, spec.data.length, cfg.max_loops):.3g}"}  # fmt: skip


pd.DataFrame([dry_run(name) for name in (looped, *others)]).set_index("spec")

# %% [markdown]
# Look at the columns *FLOPs* (equal within a comparison, up to the last step) and *tokens* (not equal: the
# looped arm sees less data). On a small corpus that can be an advantage, as its rival reads the same text
# more often.
#
# ## How S is drawn
#
# The paper draws S uniformly from 1 to S_max at every step. So do the Sudoku runs. On text a small model that
# does so from the start can stay near the unigram for a long time; there the cap on S widens from 1. That is a
# choice of ours.

# %%
shares = [0.0, 0.2, 0.3, 0.4, 0.5, 1.0]
schedules = {name: RunSpec.load(specs / f"{name}.toml") for name in ("sudoku-loop", "sotu-loop")}
pd.DataFrame(
    {name: [spec.loops.cap(share, spec.config.max_loops) for share in shares] for name, spec in schedules.items()},
    index=pd.Index(shares, name="share of the budget spent"),
).rename(columns=lambda name: f"largest S, {name}")

# %% [markdown]
# ## A run of a few seconds
#
# The smallest spec, with an even smaller budget: it learns little, but it is the whole engine. Every step is a
# function of (seed, step), so a run that is killed and resumed ends with the same weights.

# %%
small = {"training.flops": flops, "training.curve_points": 6, "training.curve_sequences": 16, "seed": seed}
spec = RunSpec.load(specs / "smoke.toml", small)
folder = Path(tempfile.mkdtemp()) / spec.name
Trainer(spec, folder).train()
print(*sorted(path.name for path in folder.iterdir()))

# %%
curve = pd.read_json(folder / "metrics.jsonl", lines=True)
curve[["step", "flops", "tokens", "n_loops", "loss", "validation_nelbo_1", "validation_nelbo_4"]].round(3)

# %% [markdown]
# The folder is a model like any other. Its `train.json` holds the spec, the corpus' hash, versions, and what
# was planned beside what was realised.

# %%
tiny = HookedLoopMDM.from_pretrained(folder)
b = tiny.mask("The state of our union is strong.", ratio=0.5)
with torch.no_grad():
    print(tiny, f"NELBO of one sentence: {nelbo(tiny, b.clean).mean:.2f} nats per token")
{name: tiny.record[name] for name in ("steps", "mean_loops", "training_flops", "corpus_sha256")}

# %% [markdown]
# ## Learning curves
#
# Now the runs that are shipped. Curves are of averaged (EMA) weights, under warm-up and then a constant rate:
# points in the middle of a decaying schedule could not be compared. Look for whether the loop curve lies to
# the left of the base curve, and whether single seeds agree: a run that breaks through late can decide a mean.

# %%
figures.FIGURES["learning-curves"].show()

# %% [markdown]
# The same on the other tasks. On the chain nobody should win: neighbours tell all there is.

# %%
figures.FIGURES["learning-curves-elsewhere"].show()

# %% [markdown]
# ## FLOPs to a target
#
# The same curves read sideways: for the loss that one arm has after a quarter, a half and all of its budget,
# how many FLOPs did the other need? Above 1: the first arm is cheaper. Crosses mean that a target was not
# reached by all runs; such a ratio is not a number, and leaving it out would flatter the arm that failed.

# %%
figures.FIGURES["flops-to-target"].show()

# %% [markdown]
# ## When does looping pay?
#
# The paper's runs see hundreds to thousands of tokens a parameter, most of ours tens; one text goes as far as the
# paper's. If a gap closes with training, its line comes down as it goes right.

# %%
figures.FIGURES["when-looping-pays"].show()

# %% [markdown]
# ## Arm by arm, seed by seed
#
# The same model, trained from other seeds, can end far apart. Five seeds are few, three decide little,
# one says nothing about the next run.

# %%
figures.FIGURES["arms"].show()

# %%
curves = tables.load("learning-curves").query("n_loops == max_loops")
last = curves.loc[curves.groupby("model")["flops"].idxmax()]
last.pivot(index=["task", "arm"], columns="seed", values="nelbo").round(3)

# %% [markdown]
# The table holds the last validation NELBO of every run at its S_max, in nats per token. Read along a row before
# you compare rows: the spread within a row is what a difference between rows has to beat.
#
# ## Where to loop, and how much
#
# The paper loops early-middle layers, and says that few suffice. Here five layers share one budget: none of them
# loops, or one, or two, or all. The crosses are the same models read at S = 1: a run whose cross lies on its
# mark was trained with loops and does not use them.

# %%
figures.FIGURES["placement"].show()

# %% [markdown]
# The other choice is how far S goes in training. A larger S_max makes a step dearer, so the same FLOPs buy fewer
# steps. Look at two things: which curve is lowest at its ring, and where each curve turns. A model whose best S
# lies beyond its ring would have had use for more loops than it was trained with.

# %%
figures.FIGURES["amount-of-looping"].show()

# %% [markdown]
# ## Verdicts
#
# The estimands and margins are in `figures/claims.toml`. Intervals run over training seeds where there are at
# least two.

# %%
mine = ["fewer-training-flops", "fewer-by-the-papers-factor", "better-at-equal-flops", "better-than-deeper",
        "leaves-the-plateau", "placement", "few-layers-suffice", "larger-s-max-is-better",
        "any-s-from-uniform"]  # fmt: skip
verdicts = claims_table().query("claim in @mine").set_index(["claim", "task"])
shown = ["verdict", "estimate", "low", "high", "unit", "margin", "direction", "n_seeds", "why"]
verdicts[shown].style.format(precision=3)

# %% [markdown]
# ## Limits
#
# Small budgets, sizes and corpora. The learning rate was swept per arm at a smaller budget still, where curves
# are often on a plateau, so rates may not be the best for every arm. Equal training FLOPs is one notion of a
# fair comparison; equal tokens or equal wall-clock would be others. And a plateau that ends at a random moment
# makes FLOPs to target a noisy number, whatever the architecture.

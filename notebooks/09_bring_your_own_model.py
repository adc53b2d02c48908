# %% [markdown]
# # Bring your own model
#
# Everything in the other notebooks runs on models that are not shipped: other sizes, other weights, other texts,
# other measures and other stopping rules. This notebook builds one of each, in a few lines. Nothing is claimed
# here, so nothing can be falsified but the code: where two things must be equal, a cell compares them.

# %% tags=["parameters"]
donor = "sotu-loop"
text = "The people of every nation hope that peace will last, and that their children will live in safety."
n = 16
seed = 0

# %%
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from loopmdm.analysis import mask_attention, measure, read_loops
from loopmdm.analysis.measures import MEASURES, Measure
from loopmdm.model import HookedLoopMDM, LoopMDM, LoopMDMConfig, StateDelta, StoppingRule, nelbo, sample
from loopmdm.model.stopping.rules import unknown

_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## A shape of one's own
#
# `LoopMDMConfig` is a frozen record with TransformerLens' field names. Shapes that cannot run are refused with
# a sentence that says why. `[MASK]` is always the last id.

# %%
cfg = LoopMDMConfig(
    d_vocab=65, n_ctx=32, d_model=48, n_heads=4, n_prelude_layers=1, n_loop_layers=2, n_coda_layers=1, max_loops=4
)
torch.manual_seed(seed)
fresh = HookedLoopMDM(LoopMDM(cfg))
print(fresh)
tokens = torch.randint(cfg.mask_token_id, (4, cfg.n_ctx), generator=torch.Generator().manual_seed(seed))
b = fresh.mask(tokens, ratio=0.5, seed=seed)
table = mask_attention(fresh, b, by_head=False).query("loop == 3 and layer == 1")
table[["query_group", "key_group", "mass", "chance", "log_odds", "log_odds_se", "n"]].round(3)

# %% [markdown]
# An untrained model is the control for every measure: what it shows is not learnt.
#
# ## Weights of one's own
#
# Any weights that fit go in by `load_state_dict`: torch only, no hooks, no TransformerLens. Here they come from
# a shipped model, so that one sees at once whether they arrived. With a tokenizer the model reads text.

# %%
shipped = HookedLoopMDM.from_pretrained(donor)
weights = {name: value.clone() for name, value in shipped.model.state_dict().items()}
own = LoopMDM(shipped.cfg).eval()
own.load_state_dict(weights)
m = HookedLoopMDM(own, shipped.tokenizer)
print(m)

# %% [markdown]
# ## Text of one's own

# %%
b = m.mask(text, ratio=0.5, seed=seed)
torch.testing.assert_close(m(b.tokens), shipped(b.tokens))
print(m.to_string(b.tokens[0]))
result = nelbo(m, b.clean, n_loops=m.cfg.max_loops, n_samples=16, seed=seed)
print(f"{result.mean:.2f} nats per token over {int(result.lengths.sum())} tokens")

# %% [markdown]
# Where several sequences come from one document, give `clusters=`: errors are then over documents. Where only
# some positions are to be predicted, give `maskable=`.

# %%
readout = read_loops(m, b, n_loops=m.cfg.max_loops)
readout[readout["masked"]].groupby("loop")[["p_true", "entropy", "correct"]].mean().round(3)

# %% [markdown]
# ## Save it, and load it back
#
# A model is a folder with safetensors and JSON; no pickle is ever read. The tokenizer is a file beside them.
# With a `train.json` that names a corpus, as training writes it, the folder's path works wherever a shipped
# name does.

# %%
folder = Path(tempfile.mkdtemp()) / "mine"
m.model.save_pretrained(folder)
if m.tokenizer is not None:
    m.tokenizer.save(str(folder / "tokenizer.json"))
again = HookedLoopMDM.from_pretrained(folder)
torch.testing.assert_close(again(b.tokens), m(b.tokens))
assert LoopMDMConfig.load(folder / "config.json") == m.cfg
print(*sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# ## Other cuts of a stack
#
# The same weights with other layers looped: the first two, say. This is a model that nobody trained for it.

# %%
wider = HookedLoopMDM(own.looping(0, 2), m.tokenizer)
for loops in (1, 2, 4):
    print(loops, round(nelbo(wider, b.clean, n_loops=loops, seed=seed).mean, 3))

# %% [markdown]
# ## A measure of one's own
#
# A measure is a function of a case (a model with its test set) and a masked batch that gives a tidy frame. An
# entry in the registry makes it a command and lets it run on any model, at any mask ratio, or along the model's
# own samples. This one asks how much longer the states of masked positions are than those of clean ones.


# %%
def norm_ratio(case, b):
    rows = []
    for loop, (state, _) in enumerate(case.m.states(b.tokens, case.n_loops)):
        norms = state.norm(dim=-1)
        ratio = norms[b.masked].mean() / norms[~b.masked].mean()
        rows.append((case.n_loops, loop, float(ratio), len(b)))
    return pd.DataFrame(rows, columns=["n_loops", "loop", "value", "n"])


MEASURES["norm-ratio"] = Measure("norm-ratio", "length of masked states by that of clean ones", norm_ratio)
found = measure("norm-ratio", donor, mask_ratios=(0.25, 0.75), n=n, seed=seed)
found.pivot(index="loop", columns="nominal_mask_ratio", values="value").round(3)

# %% [markdown]
# It has no error, and so decides nothing. `loopmdm.model.means.mean_and_error` gives one over sequences or over
# documents; the measures in `analysis/` all carry it.
#
# ## A stopping rule of one's own
#
# A rule gives a number per position; `threshold`, `patience`, `min_loops`, scope and positions come with the base
# class. NaN means that the number does not exist yet, and never stops anything. This one stops where the state
# goes straight on: its number is 1 less the cosine of two successive steps, 0 on a line.


# %%
@dataclass(frozen=True)
class Straight(StoppingRule):
    threshold: float = 0.1

    def values(self, view):
        if view.earlier is None:
            return unknown(view)
        step, before = view.state - view.previous, view.previous - view.earlier
        return 1 - torch.cosine_similarity(step, before, dim=-1)


rule = Straight(max_loops=2 * m.cfg.max_loops, positions="masked")
run = m.run(b.tokens, stop=rule)
print("criterion by loop:", run.criterion[:, 0].numpy().round(3), "loops used:", run.loops_used.tolist())

# %% [markdown]
# It works in `nelbo` and `sample` as the built-in rules do, and its cost is counted.

# %%
for name, stop in (("straight", rule), ("state-delta", StateDelta(0.1, max_loops=rule.max_loops))):
    r = nelbo(m, b.clean, stop=stop, seed=seed)
    s = sample(m, n=2, steps=4, stop=stop, seed=seed)
    print(f"{name:12s} {r.mean:.3f} nats at {r.mean_loops:.1f} loops; a sample: {s.flops:.2e} FLOPs")

# %% [markdown]
# Whether a rule is worth anything is a question for its controls: `stopping_frontier(m, tokens, rules=[rule])`,
# notebook 06.
#
# ## Training on one's own text
#
# A spec whose corpus is `files:PATTERN` reads your files; the engine is that of notebook 02:
#
#     loopmdm train my-spec.toml --set data.corpus='files:texts/*.txt' --dry-run
#
# ## Limits
#
# Weights that go into `LoopMDM` need its architecture; models of other people are driven as they are in notebook
# 10. Test sets of one's own go in as tokens; `measure` by name knows those of the shipped corpora and tasks only.

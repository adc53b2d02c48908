# %% [markdown]
# # Other people's models
#
# Masked attention, hooks at every loop, interventions and stopping are questions to any model that predicts
# hidden tokens, or that runs its layers several times. This notebook asks them of models that are not ours: a
# BERT built here, antibody models that others trained, a masked model that applies one layer again and again,
# and a looped causal one. Their own code computes; we only call their blocks, layer by layer and loop by loop.
# Where a thing is undefined for a model, it is refused by the fact that is missing, or stands as NaN with n = 0.

# %% tags=["parameters"]
specimen = "sapiens-heavy"
n = 24
seed = 0

# %%
import warnings
from itertools import pairwise

import torch
import transformers
from torch import nn
from transformer_lens import patching
from transformers.modeling_outputs import CausalLMOutput

# %%
import loopmdm as lm
from loopmdm.analysis import cut, figures, mask_attention, measure, representation_change
from loopmdm.analysis.exhibits import tables
from loopmdm.analysis.measures import MEASURES
from loopmdm.analysis.measures.case import Case
from loopmdm.analysis.measures.interventions.training_free import training_free
from loopmdm.model import ExitGate, MaskedBatch, Sequences, StateDelta, UsageError
from loopmdm.model.adapters.families import FAMILIES
from loopmdm.model.adapters.specimens import SPECIMENS
from loopmdm.model.tasks.test_sets import TestSet

_ = torch.set_grad_enabled(False)

# %% [markdown]
# ## A BERT, built here
#
# `hook_model` takes a loaded torch module. A record says where its family keeps its parts; what the record says is
# checked at once: logits against the native forward, rows of patterns, that an edit at every site changes
# something. `loop=(1, 2)` repeats layers 1 and 2, which nobody trained it for. Weights are random: what it shows
# is not learnt.

# %%
sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2}
torch.manual_seed(seed)
native = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
m = lm.hook_model(native, mask_token_id=103, loop=(1, 2), max_loops=4)
print(m, m.facts, m.record["checks"], sep="\n")

# %% [markdown]
# Run once through its layers it is the native model, bit for bit but for [MASK]'s own logit, which is never an
# answer. Falsified if the numbers differ.

# %%
tokens = torch.randint(5, 100, (16, 24), generator=torch.Generator().manual_seed(seed))
b = m.mask(tokens, ratio=0.5, seed=seed)
others = torch.arange(m.cfg.d_vocab) != 103
assert torch.equal(m(b.tokens, n_loops=1)[..., others], native(b.tokens).logits[..., others])
logits, cache = m.run_with_cache(b.tokens, n_loops=4)
print(cache, *[name for name in cache if "loop.3.blocks.2" in name], sep="\n")

# %% [markdown]
# ## The same measure
#
# Mass of masked queries on masked, clean and own keys; the three sum to 1. Nothing is learnt here, and yet the
# log-odds are not all 0: every [MASK] has the same embedding, which random weights happen to like or not. A number
# of a trained model says something where it is far from those of such a null.

# %%
table = mask_attention(m, b, n_loops=4, by_head=False)
sums = table.groupby(["depth", "query_group"])["mass"].sum()
assert (sums - 1).abs().max() < 1e-6
masked = table[(table["query_group"] == "masked") & (table["key_group"] == "masked")]
masked[["segment", "loop", "layer", "mass", "chance", "log_odds", "log_odds_se", "n"]].round(3)

# %% [markdown]
# ## The same interventions
#
# Cuts, and TransformerLens' patching on the unrolled model: a virtual layer for every application. BERT norms
# its stream after every sum, so the stream is no sum of what layers wrote, and to take it apart is refused.

# %%
with cut(m, "masked->masked", loops=slice(1, None)):
    moved = m(b.tokens, n_loops=4)
print(f"largest change of a logit by the cut: {(moved - logits)[..., others].abs().max():.3f}")
u = m.unrolled(4)
_, clean = u.run_with_cache(b.tokens[:1])
patched = patching.get_act_patch_resid_pre(u, b.tokens[1:2], clean, lambda x: x[0, 3, 7])
print("patched:", list(patched.shape), "applications x positions")
try:
    clean.decompose_resid()
except UsageError as error:
    print(error)

# %% [markdown]
# A Llama whose attention is opened to both sides norms before its layers: there attributions close. Falsified if
# the parts do not sum to the logits.

# %%
torch.manual_seed(seed)
llama = lm.hook_model(
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
    bidirectional=True,
    mask_token_id=119,
    loop=(1, 2),
    max_loops=4,
)
u = llama.unrolled(4)
found, parts = u.run_with_cache(b.tokens)
total = parts.decompose_resid(apply_ln=True).sum(0) @ u.W_U + u.b_U
torch.testing.assert_close(total, found, rtol=1e-4, atol=1e-4)
print(u, [label for label in parts.decompose_resid(return_labels=True)[1]][-4:])

# %% [markdown]
# ## Looping without training
#
# In full steps and damped by 1/S, of a model that does not loop yet. On random weights it decides nothing: the
# call is the same for every model.

# %%
plain = lm.hook_model(native, mask_token_id=103)
table = training_free(plain, tokens, n_loops=(1, 2, 4), blocks=[(1, 2)], n_samples=1, seed=seed)
table[["damping", "n_loops", "nelbo", "change", "change_se", "rise", "n"]].round(3)

# %% [markdown]
# ## A model that others trained
#
# Three antibody models come as package archives of known hash, read and never installed. If the archive is not
# here, the next cell says what to run, and goes on with the numbers of the committed table.

# %%
here = SPECIMENS[specimen].fetched
if here:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = measure("mask-attention-pooled", specimen, mask_ratios=(0.5,), n=n, seed=seed)
    print(lm.open_model(specimen), *{str(each.message) for each in said}, sep="\n")
else:
    print(f"{specimen} is not here: `loopmdm data fetch {SPECIMENS[specimen].archive}`; the committed numbers:")
    theirs = tables.load("attention-of-others").query("model == @specimen and nominal_mask_ratio == 0.5")
theirs = theirs[(theirs["query_group"] == "masked") & (theirs["key_group"] == "masked")]
theirs[["layer", "mass", "chance", "log_odds", "log_odds_se", "n"]].round(3)

# %% [markdown]
# ## Beside ours
#
# **Question.** Is the turn of masked queries to masked keys, which our looped layer makes, a habit of masked
# models? **It shows:** layers of antibody models look away from masked keys, all but two of them, while five of
# six loops of ours look towards them. But two of the four layers of `sotu-base`, which do not loop, look towards
# them as well.
# **It would be no mark of looping** if layers of models without loops did the same throughout. **Limits:** other
# data, sizes and training: not a comparison of arms.

# %%
figures.FIGURES["attention-of-others"].show()

# %% [markdown]
# **Question.** Do middle layers of models that never looped gain from being run several times? **It shows:** four
# full passes cost in every block. Damped ones gain at most 0.04 nats and cost up to 0.12. Log-odds rise in some
# without any gain.
# **Falsified** by curves below 0 throughout. **Limits:** the chains are samples of `antiberty`; single blocks
# below 0 stand among nine that were tried.

# %%
figures.FIGURES["training-free-of-others"].show()

# %% [markdown]
# ## One layer, again and again
#
# ALBERT is a looped masked language model with nothing before or after the loop. Masses sum to 1 at every
# application, and unrolled it is the native model. Falsified if either fails.

# %%
torch.manual_seed(seed)
native = transformers.AlbertForMaskedLM(
    transformers.AlbertConfig(**sizes | {"embedding_size": 16, "num_hidden_layers": 6})
)
albert = lm.hook_model(native, mask_token_id=103)
print(albert)
u = albert.unrolled()
assert torch.equal(u(b.tokens)[..., others], native(b.tokens).logits[..., others])
table = mask_attention(albert, b, by_head=False)
assert (table.groupby(["loop", "query_group"])["mass"].sum() - 1).abs().max() < 1e-6
table.query("query_group == 'masked'").pivot(index="loop", columns="key_group", values="mass").round(3)

# %% [markdown]
# ## A looped causal model
#
# A stand-in of Ouro's shape: all layers loop, the final norm follows each loop, a gate says how likely it is to
# stop. Weights are random.


# %%
class OuroConfig(transformers.LlamaConfig):
    total_ut_steps: int = 4


class OuroForCausalLM(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.early_exit_gate = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.model.embed_tokens(input_ids)
        for _ in range(self.config.total_ut_steps):
            x = self.model(inputs_embeds=x, attention_mask=attention_mask, **kwargs).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(x))


# %%
torch.manual_seed(seed)
native = OuroForCausalLM(OuroConfig(**sizes))
ouro = lm.hook_model(native)
assert torch.equal(ouro(tokens), native(tokens).logits)
states = list(ouro.states(tokens, n_loops=6))
answers = [ouro.readout(state, context).argmax(-1) for state, context in states]
kept = [float((after == before).float().mean()) for before, after in pairwise(answers)]
print(ouro, f"answers kept from loop to loop: {[round(share, 2) for share in kept]}", sep="\n")

# %% [markdown]
# What can be asked: how much states change by loop, what each loop would answer, when a rule stops, the model's
# own gate among them.

# %%
whole = MaskedBatch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.bool))
change = representation_change(ouro, whole, n_loops=6)
for rule in (StateDelta(0.3, max_loops=12), ExitGate(0.5, max_loops=12)):
    print(f"{rule.name}: {ouro.run(tokens, stop=rule).loops_used.tolist()}")
change = change[(change["token_group"] == "clean") & (change["lens"] == "")]
change.pivot(index="loop", columns="metric", values="value").round(3)

# %% [markdown]
# What cannot: masked groups. A causal model has no [MASK], so that a function refuses, and a table that stands
# beside others has rows of NaN with n = 0: nothing was measured, which is not the same as zero.

# %%
try:
    mask_attention(ouro, whole)
except UsageError as error:
    print(error)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    table = MEASURES["mask-attention-pooled"].of(Case(ouro, TestSet("random", Sequences.of(tokens))))
print(said[0].message)
table[["loop", "layer", "query_group", "key_group", "mass", "log_odds", "n"]].head(6)

# %% [markdown]
# ## With a network and enough memory
#
# Two lines a model; none of them was run here. Their code lies beside their weights: `trust_remote_code` lets it
# run, `revision` pins what was read.
#
#     m = lm.open_model("hf:GSAI-ML/LLaDA-8B-Base", trust_remote_code=True, dtype=torch.bfloat16)
#     mask_attention(m, m.mask("The state of our union is strong", ratio=0.5))
#
#     m = lm.open_model("hf:Dream-org/Dream-v0-Base-7B", trust_remote_code=True, dtype=torch.bfloat16)
#     mask_attention(m, m.mask("The state of our union is strong", ratio=0.5), by="predicts")  # shifted by one
#
#     m = lm.open_model("hf:kuleshov-group/mdlm-owt", trust_remote_code=True)
#     lm.nelbo(m, m.to_tokens("The state of our union is strong"), n_samples=8)
#
#     m = lm.open_model("hf:tomg-group-umd/huginn-0125", trust_remote_code=True, dtype=torch.bfloat16)
#     m.run(m.to_tokens("The state of our union"), stop=StateDelta(0.03, max_loops=64)).loops_used
#
#     m = lm.open_model("hf:ByteDance/Ouro-1.4B", trust_remote_code=True, dtype=torch.bfloat16)
#     m.run(m.to_tokens("The state of our union"), stop=ExitGate(0.5, max_loops=4)).loops_used
#
# The families that have a record; others are taken in by six paths, which the error names:

# %%
for name, family in FAMILIES.items():
    kind = ("causal" if family.causal else "masked") + (", loops itself" if family.loop else "")
    own = "its authors' code" if not family.classes else "transformers"
    print(f"{name:12s} {kind:20s} {family.home or own}")

# %% [markdown]
# ## Limits
#
# Hub models, GPUs and remote code were not tried; stand-ins of their shapes were. Masking beyond what a model was
# trained with is extrapolation, and said so. Specimens are small, and measured on chains that one of them sampled.

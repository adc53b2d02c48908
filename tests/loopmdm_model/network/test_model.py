"""A loop of k iterations *is* k untied copies in a row; everything else follows from that."""

import itertools

import pytest
import torch

from loopmdm.model.diffusion.likelihood import Read, draws, masked_cross_entropy, nelbo
from loopmdm.model.errors import UsageError
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.network.model import LoopMDM
from loopmdm.model.sequences import Sequences
from loopmdm.model.stopping.rules import StateDelta
from loopmdm.model.taps import explicit_taps
from tests.conftest import toy_config, toy_model


def unrolled_copy(model: LoopMDM, n_loops: int) -> LoopMDM:
    """A plain model whose layers are untied copies of the looped model's applications."""
    cfg = model.cfg
    order = [*cfg.layers("prelude"), *list(cfg.layers("loop")) * n_loops, *cfg.layers("coda")]
    shape = cfg.to_dict() | {"n_prelude_layers": len(order), "n_loop_layers": 0, "n_coda_layers": 0}
    plain = LoopMDM(LoopMDMConfig.from_dict(shape)).eval()
    weights = model.state_dict()
    copied = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    for depth, layer in enumerate(order):
        source = f"blocks.{layer}."
        copied |= {n.replace(source, f"blocks.{depth}.", 1): v for n, v in weights.items() if n.startswith(source)}
    plain.load_state_dict(copied)
    return plain


@pytest.mark.parametrize("n_loops", [1, 2, 5])
def test_looped_equals_unrolled_bit_for_bit(model, batch, n_loops):
    plain = unrolled_copy(model, n_loops)
    assert torch.equal(model(batch.tokens, n_loops=n_loops), plain(batch.tokens, n_loops=1))


def test_one_loop_is_the_plain_model(batch):
    looped = toy_model()
    plain = toy_model(n_prelude_layers=4, n_loop_layers=0, n_coda_layers=0, max_loops=1)
    plain.load_state_dict(looped.state_dict())
    assert torch.equal(looped(batch.tokens, n_loops=1), plain(batch.tokens))


def test_states_do_not_depend_on_n_loops_and_readout_is_the_shorter_model(model, batch):
    for loop, (state, context) in enumerate(model.states(batch.tokens, 4)):
        assert torch.equal(model.readout(state, context), model(batch.tokens, n_loops=loop + 1))


@pytest.mark.parametrize("changes", [{}, {"forbid_mask_to_mask": ("loop",)}, {"normalization_type": "RMS"}])
def test_explicit_attention_equals_sdpa(batch, changes):
    model = toy_model(**changes)
    mask = torch.ones_like(batch.tokens)
    mask[0, 7:] = 0
    fused = model(batch.tokens, attention_mask=mask)
    explicit = model(batch.tokens, attention_mask=mask, taps=explicit_taps)
    torch.testing.assert_close(explicit, fused, atol=2e-5, rtol=1e-4)  # order of fp32 sums


@pytest.mark.parametrize("left", [0, 3])
def test_padded_equals_unpadded(model, batch, left):
    tokens = batch.tokens[:1]
    padded = torch.nn.functional.pad(tokens, (left, 3), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (left, 3))
    out = model(padded, attention_mask=mask)[:, left : left + tokens.shape[1]]
    torch.testing.assert_close(out, model(tokens), atol=2e-5, rtol=1e-4)  # RoPE is relative


def test_mask_logit_is_minus_infinity_and_nothing_else(model, batch):
    logits = model(batch.tokens)
    assert (logits[..., 22] == float("-inf")).all()
    assert logits[..., :22].isfinite().all()


GRID = list(itertools.product([16, 32], [1, 4], [1, 3], [0, 1]))


@pytest.mark.parametrize(("d_model", "n_heads", "layers", "attn_bias"), GRID)
def test_parity_with_a_bidirectional_hugging_face_llama(d_model, n_heads, layers, attn_bias):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(d_model + n_heads + layers)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=23, hidden_size=d_model, intermediate_size=3 * d_model, num_hidden_layers=layers,
            num_attention_heads=n_heads, num_key_value_heads=n_heads, max_position_embeddings=16,
            rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=bool(attn_bias),
            initializer_range=0.3, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    ours = LoopMDM(
        toy_config(
            d_model=d_model, n_heads=n_heads, d_mlp=3 * d_model, n_prelude_layers=layers, n_loop_layers=0,
            n_coda_layers=0, max_loops=1, normalization_type="RMS", act_fn="silu", gated_mlp=True, eps=1e-6,
            norm_bias=False, attn_bias=bool(attn_bias), mlp_bias=False, unembed_bias=False,
        )
    ).eval()  # fmt: skip
    ours.load_state_dict(from_llama(theirs.state_dict(), layers))
    tokens = torch.randint(0, 23, (2, 11))
    everyone = torch.zeros(2, 1, 11, 11)
    expected = theirs(input_ids=tokens, attention_mask=everyone, use_cache=False).logits[..., :22]
    torch.testing.assert_close(ours(tokens)[..., :22], expected, atol=1e-4, rtol=1e-4)


def from_llama(theirs: dict, layers: int) -> dict:
    """Llama's names to ours; q, k and v are stacked."""
    named = {"embed.weight": theirs["model.embed_tokens.weight"], "unembed.weight": theirs["lm_head.weight"]}
    named["ln_final.weight"] = theirs["model.norm.weight"]
    pairs = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn.out": "self_attn.o_proj"}
    pairs |= {"mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.out": "mlp.down_proj"}
    for layer in range(layers):
        source, target = f"model.layers.{layer}.", f"blocks.{layer}."
        for kind in ("weight", "bias"):
            for ours, name in pairs.items():
                if f"{source}{name}.{kind}" in theirs:
                    named[f"{target}{ours}.{kind}"] = theirs[f"{source}{name}.{kind}"]
            parts = [theirs.get(f"{source}self_attn.{x}_proj.{kind}") for x in "qkv"]
            if parts[0] is not None:
                named[f"{target}attn.qkv.{kind}"] = torch.cat(parts)
    return named


def test_forbidding_mask_to_mask_leaves_masked_queries_blind_to_other_masked_keys(batch):
    model = toy_model(forbid_mask_to_mask=("prelude", "loop", "coda"))
    query = int(batch.masked[0].nonzero()[0])
    other = int(batch.masked[0].nonzero()[1])
    before = model(batch.tokens)[0, query]
    revealed = batch.tokens.clone()
    revealed[0, other] = batch.clean[0, other]
    assert not torch.allclose(before[:22], model(revealed)[0, query][:22])  # a clean key is seen
    # a masked key's own embedding is not: shifting it must not move the query
    context = model.context(batch.tokens)
    x = model.embed(batch.tokens)
    moved = x.clone()
    moved[0, other] += 1.0
    run = lambda start: model.blocks[0](start, context.rotary, context.allowed["prelude"])  # noqa: E731
    torch.testing.assert_close(run(x)[0, query], run(moved)[0, query])


@pytest.mark.parametrize("loops", [1, 3])
def test_with_masked_keys_hidden_from_all_no_position_relays_what_a_masked_one_holds(batch, loops):
    everywhere = ("prelude", "loop", "coda")
    other = int(batch.masked[0].nonzero()[1])
    for field, relays in (("forbid_masked_keys", False), ("forbid_mask_to_mask", True)):
        model = toy_model(**{field: everywhere})
        context = model.context(batch.tokens)
        start = model.prelude(batch.tokens, context)
        run = lambda x: [x := model.loop(x, context, i) for i in range(loops)][-1]  # noqa: B023, E731
        moved = start.clone()
        moved[0, other] += torch.linspace(-1, 1, start.shape[-1])
        change = (run(moved) - run(start))[0].abs().amax(-1)
        assert change[other] > 0.1
        change[other] = 0
        assert (change.max() > 1e-3) == relays  # a clean position reads it, and is read in the next loop


@pytest.mark.parametrize("field", ["forbid_mask_to_mask", "forbid_masked_keys"])
def test_forbidding_with_padded_masks_has_no_nan(field):
    model = toy_model(**{field: ("loop",)})
    tokens, real = torch.full((1, 6), 22), torch.tensor([[1, 1, 1, 1, 0, 0]])
    explicit = model(tokens, n_loops=2, attention_mask=real, taps=explicit_taps)
    fused = model(tokens, n_loops=2, attention_mask=real)
    assert explicit[..., :22].isfinite().all()
    torch.testing.assert_close(explicit[:, :4], fused[:, :4], atol=2e-5, rtol=1e-4)


def test_initial_output_projections_shrink_with_effective_depth():
    shallow = toy_model(d_model=64, n_heads=4, max_loops=1, initializer_range=0.02)
    deep = toy_model(d_model=64, n_heads=4, max_loops=12, initializer_range=0.02)
    ratio = shallow.blocks[0].mlp.out.weight.std() / deep.blocks[0].mlp.out.weight.std()
    expected = (deep.cfg.effective_depth / shallow.cfg.effective_depth) ** 0.5
    assert abs(ratio / expected - 1) < 0.02
    assert deep.cfg.effective_depth == 1 + 6.5 * 2 + 1


def test_extra_depth_may_be_counted_in_the_looped_layers_alone():
    once, often = (toy_model(max_loops=loops, init_depth="looped").state_dict() for loops in (1, 12))
    looped = ("blocks.1.", "blocks.2.")
    writes = ("attn.out.weight", "mlp.out.weight")
    for name, weight in once.items():
        if name.startswith(looped) and name.endswith(writes):
            torch.testing.assert_close(often[name], weight * (4 / 15) ** 0.5)  # 1 + 2 + 1 of 1 + 6.5 * 2 + 1
        else:
            assert torch.equal(often[name], weight)


def test_paper_scale_counts_162_million_parameters():
    shape = {"d_vocab": 50258, "n_ctx": 1024, "d_model": 768, "n_heads": 12, "max_loops": 12}
    cfg = LoopMDMConfig(**shape, n_prelude_layers=1, n_loop_layers=2, n_coda_layers=9)
    with torch.device("meta"):
        assert round(LoopMDM(cfg).n_parameters / 1e6, 1) == 162.3


def test_sequences_stop_on_their_own_and_match_fixed_runs(model, batch):
    full = model.run(batch.tokens, stop=StateDelta(0.0, max_loops=6))
    assert full.loops_used.tolist() == [6] * 4
    assert full.criterion[0].isnan().all() and full.criterion[1:].isfinite().all()
    threshold = float(full.criterion[3].median()) + 1e-5
    run = model.run(batch.tokens, stop=StateDelta(threshold, max_loops=6))
    assert len(set(run.loops_used.tolist())) > 1  # some stop early, some do not
    for row, used in enumerate(run.loops_used.tolist()):
        alone = model(batch.tokens[row : row + 1], n_loops=used)
        torch.testing.assert_close(run.logits[row : row + 1], alone, atol=2e-5, rtol=1e-4)
        below = (full.criterion[:, row] < threshold).nonzero()
        assert used == (int(below[0]) + 1 if len(below) else 6)  # stops where the replay stops


def test_infinite_threshold_gives_the_minimum(model, batch):
    for least in (2, 3):
        rule = StateDelta(float("inf"), max_loops=6, min_loops=least)
        assert model.run(batch.tokens, stop=rule).loops_used.tolist() == [least] * 4


@pytest.mark.parametrize(
    ("tokens", "arguments", "says"),
    [
        (torch.zeros(1, 4, dtype=torch.long), {"n_loops": 0}, "at least 1"),
        (torch.zeros(1, 4, dtype=torch.long), {"n_loops": 2.0}, "must be an integer"),
        (torch.zeros(1, 4, dtype=torch.long), {"n_loops": True}, "must be an integer"),
        (torch.full((1, 4), 23), {}, "outside 0..22"),
        (torch.full((1, 4), -1), {}, "outside 0..22"),
        (torch.zeros(1, 17, dtype=torch.long), {}, "exceeds n_ctx = 16"),
        (torch.zeros(1, 4), {}, "integer tensor"),
        (torch.zeros(4, dtype=torch.long), {}, r"\[batch, pos\]"),
        (torch.zeros(1, 4, dtype=torch.long), {"attention_mask": torch.ones(1, 3)}, "one entry per token"),
        (torch.zeros(1, 4, dtype=torch.long), {"attention_mask": torch.zeros(1, 4).int()}, "hides every token"),
        (torch.zeros(1, 4, dtype=torch.long), {"into": len}, "give these, too"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(tokens, arguments, says):
    with pytest.raises(UsageError, match=says) as caught:
        toy_model().run(tokens, **arguments)
    assert "\n" not in str(caught.value)


def test_all_clean_and_all_masked_batches_are_valid(model, clean):
    assert model(clean).shape == (4, 10, 23)
    assert model(torch.full_like(clean, 22)).isnan().sum() == 0


def test_a_model_in_double_is_double_on_every_path(batch):
    model = toy_model().double()
    fused = model(batch.tokens, n_loops=3)
    explicit = model(batch.tokens, n_loops=3, taps=explicit_taps)
    assert fused.dtype == torch.float64
    torch.testing.assert_close(fused[..., :22], explicit[..., :22], atol=1e-12, rtol=1e-12)
    one = nelbo(model, batch.clean, n_loops=2, n_samples=2).per_sequence
    masks = [b for b, _ in draws(model, Sequences.of(batch.clean), Read(n_loops=2, n_samples=2))]
    losses = [masked_cross_entropy(model(b.tokens, 2, taps=explicit_taps), b) for b in masks]
    torch.testing.assert_close(one, torch.stack(losses).mean(0), atol=1e-12, rtol=1e-12)

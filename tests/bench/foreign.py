"""Other people's models: what listening costs, and one of eight billion parameters without its weights."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from loopmdm.model.adapters import hook_model
from loopmdm.model.adapters.core import ForeignCore
from loopmdm.model.sites import at
from tests.bench.common import Row, at_most, ratio

LENGTH, VOCAB = 128, 1024
SIZES = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 1024, "max_position_embeddings": LENGTH, "attn_implementation": "sdpa"}
LLADA_8B = {"vocab_size": 126464, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLADA_8B |= {"num_key_value_heads": 32, "intermediate_size": 12288, "max_position_embeddings": 4096}


def listening() -> Iterator[Row]:
    """Nobody listening, patterns cached, everything cached, each against the native forward."""
    yield from _listening("Bert", "ForMaskedLM")
    yield from _listening("Llama", "ForCausalLM", bidirectional=True)  # LLaDA's shape


def _listening(name: str, kind: str, **how: Any) -> Iterator[Row]:
    import transformers

    native = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**SIZES)).eval()
    m = hook_model(native, mask_token_id=VOCAB - 1, **how)
    tokens = torch.randint(5, VOCAB - 1, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    core, patterns = cast(ForeignCore, m.model), at(leaf="pattern")
    ours: dict[str, tuple[float, Callable[[], Any]]] = {
        "nobody listening": (1.1, lambda: m(tokens)),
        "caching patterns": (1.4, lambda: m.run_with_cache(tokens, names_filter=patterns)),
        "caching everything": (1.7, lambda: m.run_with_cache(tokens)),
    }
    with torch.inference_mode():
        for what, (goal, run) in ours.items():
            value = ratio(run, lambda: core.native_logits(tokens), 15)
            yield at_most(f"{name} d=256 6 layers T=128, {what}, / native forward", value, goal)


OPENING = """
import sys
from loopmdm.model import open_model, sites
m = open_model(sys.argv[1], device="meta", bidirectional=True, mask_token_id=126336)
print(m)
print(sites.listing(m.cfg, m.cfg.max_loops, 1, m.cfg.n_ctx))
"""


def sites_of_eight_billion() -> Iterator[Row]:
    """A process that opens a model of LLaDA-8B's sizes on the meta device and prints its sites, with imports."""
    from transformers import LlamaConfig

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LLADA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", OPENING, folder], capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - start)
    yield at_most("8 billion parameters without weights: map of sites", statistics.median(seconds), 10.0, " s")

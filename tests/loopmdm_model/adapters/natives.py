"""Tiny random models of transformers' own classes, their weights large enough that attention is not uniform."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

transformers.logging.set_verbosity_error()

V, LENGTH = 120, 12
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40}
GROUPED = SIZES | {"num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONFIGS = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "Albert": SIZES | {"embedding_size": 16, "num_hidden_layers": 3},
    "ModernBert": SIZES | SPECIAL | {"local_attention": 6, "layer_types": WINDOWS},
    "Esm": SIZES | {"pad_token_id": 1, "mask_token_id": 32, "position_embedding_type": "rotary"},
    "DistilBert": {"vocab_size": V, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48},
    "Electra": SIZES | {"embedding_size": 16},
    "Qwen3": GROUPED | {"head_dim": 8},
    "Qwen2": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 6},
    "Llama": GROUPED,
    "GPTNeoX": SIZES,
    "HrmText": SIZES | {"head_dim": 8, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "pad_token_id": 0},
    "OPT": {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Cohere": GROUPED | {"logit_scale": 0.3},
    "BitNet": GROUPED,
    "RobertaPreLayerNorm": SIZES,
    "GPT2": {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40},
}
CAUSAL = ("Qwen3", "Qwen2", "Mistral", "Llama", "GPTNeoX", "HrmText", "OPT", "Cohere", "BitNet")
GUESSED = ("GPT2", "GPTNeoX", "OPT", "Cohere", "BitNet", "RobertaPreLayerNorm")


def config(name: str, **changes):
    return getattr(transformers, f"{name}Config")(**(CONFIGS[name] | changes))


def native(name: str, attention: str = "sdpa", **changes) -> torch.nn.Module:
    """A model by the name of its classes, as `attention` computes it; the same weights each time."""
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM" if name in CAUSAL else "ForMaskedLM"
    settings = config(name, **changes)
    settings._attn_implementation = attention
    model = getattr(transformers, f"{name}{kind}")(settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.tie_weights()
    return model.eval()


def tokens(batch: int = 3, seed: int = 1, length: int = LENGTH) -> torch.Tensor:
    """Ids that are neither special nor a [MASK] of these models."""
    return torch.randint(40, 100, (batch, length), generator=torch.Generator().manual_seed(seed))

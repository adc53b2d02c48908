"""Tiny random models stored as specimens are."""

import io
import zipfile
from argparse import Namespace

import torch
import transformers

from loopmdm.model.adapters.specimens import ENCODER, PARTS
from tests.loopmdm_model.adapters import natives

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SIZES = natives.SIZES | {"vocab_size": 25, "num_hidden_layers": 2, "num_attention_heads": 2}


def fairseq(native: transformers.RobertaForMaskedLM, told: Namespace) -> bytes:
    """A model's weights as fairseq stores them."""
    names = {ours: theirs for theirs, ours in PARTS.items()}
    stored = {}
    for name, tensor in native.state_dict().items():
        part, _, kind = name.rpartition(".")
        if part.startswith("roberta.encoder.layer."):
            number, part = part.removeprefix("roberta.encoder.layer.").split(".", 1)
            stored[f"{ENCODER}layers.{number}.{names[part]}.{kind}"] = tensor
        elif part in names:
            head = part.startswith("lm_head")
            stored[f"{'decoder.' if head else ENCODER}{names[part]}.{kind}"] = tensor
    out = io.BytesIO()
    torch.save({"args": told, "model": stored}, out)
    return out.getvalue()


def zipped(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def sapiens(folder):
    """A tiny RoBERTa, and the archive below `folder` in which it lies."""
    native = natives.native("Roberta", **SIZES, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    with torch.no_grad():
        native.roberta.embeddings.token_type_embeddings.weight.zero_()
    told = Namespace(
        encoder_embed_dim=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_embed_dim=48,
        max_positions=38,
    )  # fmt: skip
    inside = "sapiens/models/v1/"
    words = "\n".join(f"{letter} 1" for letter in RESIDUES)
    files = {inside + "checkpoint_vh.pt": fairseq(native, told), inside + "dict.txt": words.encode()}
    return native, zipped(folder / "archive.whl", files)

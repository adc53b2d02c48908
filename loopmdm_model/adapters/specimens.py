"""Pretrained models that are fetched as package archives, as corpora are: hash-pinned, read, never installed.

    sapiens-heavy, sapiens-light   human antibody chains (Prihoda et al. 2022), RoBERTa, 0.57 M parameters
    antiberty                      antibody chains of six species (arXiv 2112.07782), BERT, 25.8 M parameters

Weights are read with `weights_only=True`. `loopmdm data fetch sapiens antiberty` fetches them.
"""

import io
import json
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from loopmdm.model.corpora.fetch import Source, cached_archive, source
from loopmdm.model.errors import UsageError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Specimen:
    """A pretrained model inside an archive.

    `archive` is the name it is fetched by, `folder` and `file` where in it the weights lie, `corpus` the test set
    that goes with it, `layers` its number, `gaps` the letters by which its authors write a hidden residue. `build`
    makes the native model of transformers and its tokenizer.
    """

    name: str
    archive: str
    folder: str
    file: str
    corpus: str
    layers: int
    d_model: int
    gaps: str
    build: Callable[["Opened"], tuple[nn.Module, Tokenizer]]

    @property
    def source(self) -> Source:
        """Package, version, hash, licence."""
        return source(self.archive)

    @property
    def fetched(self) -> bool:
        """Whether its archive is here."""
        return cached_archive(self.source) is not None

    def load(self) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
        """The native model, its tokenizer and where they come from; UsageError if it is not fetched."""
        path = cached_archive(self.source)
        if path is None:
            raise UsageError(f"{self.name} is not here yet; run `loopmdm data fetch {self.archive}`")
        with zipfile.ZipFile(path) as file:
            native, tokenizer = self.build(Opened(file, self))
        item = self.source
        told = {"source": f"{item.package}=={item.version}", "revision": item.sha256, "licence": item.licence}
        return native, tokenizer, told | {"spec": {"data": {"corpus": self.corpus}}}


@dataclass(frozen=True)
class Opened:
    """A specimen's archive, open for reading."""

    file: zipfile.ZipFile
    specimen: Specimen

    def text(self, name: str) -> str:
        """A file beside the weights, or above them."""
        folder = Path(self.specimen.folder)
        places = [str(folder / name), str(folder.parent / name)]
        return self.file.read(next(place for place in places if place in self.file.namelist())).decode()

    def weights(self) -> Any:
        """What the weights' file holds; no code in it is run."""
        raw = io.BytesIO(self.file.read(str(Path(self.specimen.folder) / self.specimen.file)))
        with torch.serialization.safe_globals([Namespace]):  # fairseq keeps its command line beside the weights
            return torch.load(raw, map_location="cpu", weights_only=True)


def residues(words: list[str], around: tuple[str, str]) -> Tokenizer:
    """One token a residue between begin and end."""
    vocabulary = {word: number for number, word in enumerate(words)}
    unknown = next(word for word in words if "unk" in word.lower())
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    special = [word for word in words if not word.isalpha()]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    begin, end = around
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{begin} $A {end}", special_tokens=[(word, vocabulary[word]) for word in around]
    )
    return tokenizer


# --- sapiens: fairseq's names to transformers' ---

PARTS = {
    "embed_tokens": "roberta.embeddings.word_embeddings",
    "embed_positions": "roberta.embeddings.position_embeddings",
    "emb_layer_norm": "roberta.embeddings.LayerNorm",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
    "lm_head.dense": "lm_head.dense",
    "lm_head.layer_norm": "lm_head.layer_norm",
    "lm_head": "lm_head.decoder",
}
ENCODER = "decoder.sentence_encoder."


def fairseq_weights(found: Weights) -> dict[str, Tensor]:
    """Weights of fairseq's RoBERTa under transformers' names."""
    named = {}
    for name, tensor in found.items():
        part, _, kind = name.removeprefix(ENCODER).removeprefix("decoder.").rpartition(".")
        layer = ""
        if part.startswith("layers."):
            _, number, part = part.split(".", 2)
            layer = f"roberta.encoder.layer.{number}."
        named[f"{layer}{PARTS[part]}.{kind}"] = tensor
    return named | {"lm_head.bias": found["decoder.lm_head.bias"]}


def _sapiens(opened: Opened) -> tuple[nn.Module, Tokenizer]:
    from transformers import RobertaConfig, RobertaForMaskedLM

    residue = [line.split()[0] for line in opened.text("dict.txt").splitlines()]
    words = ["<s>", "<pad>", "</s>", "<unk>", *residue, "<mask>"]
    stored = opened.weights()
    told, weights = stored["args"], fairseq_weights(stored["model"])
    config = RobertaConfig(
        vocab_size=len(words), hidden_size=told.encoder_embed_dim, num_hidden_layers=told.encoder_layers,
        num_attention_heads=told.encoder_attention_heads, intermediate_size=told.encoder_ffn_embed_dim,
        max_position_embeddings=told.max_positions + 2, type_vocab_size=1, layer_norm_eps=1e-5,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    native = RobertaForMaskedLM(config)
    weights["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, told.encoder_embed_dim)
    native.load_state_dict(weights)
    return native, residues(words, ("<s>", "</s>"))


def _antiberty(opened: Opened) -> tuple[nn.Module, Tokenizer]:
    from transformers import BertConfig, BertForMaskedLM

    words = opened.text("vocab.txt").split()
    config = BertConfig(**json.loads(opened.text("config.json")))
    config._name_or_path, config._attn_implementation = "", "sdpa"
    native = BertForMaskedLM(config)
    others = ("bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.", "bert.embeddings.position_ids")
    native.load_state_dict({name: w for name, w in opened.weights().items() if not name.startswith(others)})
    return native, residues(words, ("[CLS]", "[SEP]"))


# fmt: off
SPECIMENS = {
    specimen.name: specimen
    for specimen in (
        Specimen("sapiens-heavy", "sapiens", "sapiens/models/v1", "checkpoint_vh.pt", "antibody-heavy", 4, 128,
                 "*X", _sapiens),
        Specimen("sapiens-light", "sapiens", "sapiens/models/v1", "checkpoint_vl.pt", "antibody-light", 4, 128,
                 "*X", _sapiens),
        Specimen("antiberty", "antiberty", "antiberty/trained_models/AntiBERTy_md_smooth", "pytorch_model.bin",
                 "antibody-heavy", 8, 512, "_", _antiberty),
    )
}
# fmt: on

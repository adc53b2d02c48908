"""A sparse dictionary over loops: a few of many directions, added up, give the states back.

With z_s = (x_s - mean_s) / scale_s the state at site s (default H(0), .., H(S-1) of one position), a code f >= 0
and decoder directions D, in two kinds:

    crosscoder   f = act(sum_s z_s E_s + b),  z_s ~ f D_s       one code for all loops, directions by loop
    sae          f_s = act(z_s E + b),        z_s ~ f_s D       a code at each loop, one set of directions

Crosscoders: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing". A crosscoder
reads all loops at once: what it gives back at loop i may come from later loops; an SAE's does not. `act` is ReLU,
then all (relu), the k largest of a row (topk, Gao et al. 2024), or k a row on average, as a batch has them
(batchtopk, Bussmann et al. 2024), for which a fixed threshold stands after training. Features are weighed by sum_s
|D_s|, which is 1 for each of them once trained, so that codes are in one unit.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from loopmdm.analysis.activations import Identity
from loopmdm.model.errors import NotFiniteError, UsageError, check_count, check_word
from loopmdm.model.files import is_file, read_json, sha256, write_json
from loopmdm.model.hooks.hooked import HookedLoopMDM
from loopmdm.model.network.checkpoints import WEIGHTS_HASH, ZOO, resolve, write_tensors
from loopmdm.model.sites import Site

Kind = Literal["crosscoder", "sae"]
Activation = Literal["batchtopk", "topk", "relu"]
FILE, RECORD = "dictionary.safetensors", "dictionary.json"
LARGE = ("encoder", "decoder")
"""What may be kept in half precision."""


def list_dictionaries() -> list[str]:
    """Names of the shipped models that a dictionary is shipped with."""
    return sorted(path.parent.name for path in ZOO.glob(f"*/{FILE}") if is_file(path.with_name(RECORD)))


@dataclass(frozen=True)
class Shape:
    """`kind` of dictionary, how many features, which activation; `k` active a row (no bound for relu)."""

    kind: Kind = "crosscoder"
    n_features: int = 256
    activation: Activation = "batchtopk"
    k: int = 16

    def __post_init__(self):
        """Known words; k features exist."""
        check_word("kind", self.kind, get_args(Kind))
        check_word("activation", self.activation, get_args(Activation))
        check_count("n_features", self.n_features)
        check_count("k", self.k, most=self.n_features)


@dataclass(frozen=True)
class Origin:
    """What a dictionary is of: a model, sites in running order, positions, loops run; `told` is its record."""

    model: Identity
    sites: tuple[str, ...]
    positions: str
    n_loops: int
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def loops(self) -> list[int | None]:
        """The loop of each site, None outside the loop."""
        return [Site.parse(name).loop for name in self.sites]


class Dictionary(nn.Module):
    """A sparse dictionary of one model's states over loops; `from_pretrained` opens one that is shipped.

    `encoder` [view, d_model, feature], `bias` [feature], `decoder` [view, feature, d_model]; see the module.

    A view is a site of a crosscoder, or all sites of an SAE. `mean` [view, d_model] and `scale` [view] are taken
    off first, `means` [site, d_model] is each site's own mean. Codes are [row, code, feature]: one code of a
    crosscoder, one a site of an SAE.
    """

    mean: Tensor
    means: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(self, shape: Shape, origin: Origin, d_model: int):
        super().__init__()
        self.shape, self.origin = shape, origin
        views = len(origin.sites) if shape.kind == "crosscoder" else 1
        self.encoder = nn.Parameter(torch.zeros(views, d_model, shape.n_features))
        self.decoder = nn.Parameter(torch.zeros(views, shape.n_features, d_model))
        self.bias = nn.Parameter(torch.zeros(shape.n_features))
        self.register_buffer("mean", torch.zeros(views, d_model))
        self.register_buffer("means", torch.zeros(len(origin.sites), d_model))
        self.register_buffer("scale", torch.ones(views))
        self.register_buffer("threshold", torch.zeros(()))

    def __repr__(self) -> str:
        """Kind, size, sites and model."""
        s, o = self.shape, self.origin
        active = s.activation if s.activation == "relu" else f"{s.activation}, k = {s.k}"
        where = o.sites[0] if len(o.sites) == 1 else f"{o.sites[0]} .. {o.sites[-1]}"
        return f"Dictionary({s.kind}, {s.n_features} features, {active}; {where} of {o.model.name or 'unnamed'})"

    # --- coding ---

    @property
    def weights(self) -> Float[Tensor, " feature"]:
        """The sum over views of |D|: what a feature's sparsity is weighed by."""
        return self.decoder.norm(dim=-1).sum(0)

    @property
    def shared(self) -> bool:
        """Whether one code stands for all sites."""
        return self.shape.kind == "crosscoder"

    def normalised(self, x: Float[Tensor, "row site d_model"]) -> Float[Tensor, "row site d_model"]:
        """z: less the mean, over the scale, on the dictionary's device."""
        self._check(x)
        return (x.to(self.mean) - self.mean) / self.scale[:, None]

    def before(self, z: Float[Tensor, "row site d_model"]) -> Float[Tensor, "row code feature"]:
        """Codes before the activation."""
        if self.shared:
            return (z.flatten(1) @ self.encoder.flatten(0, 1) + self.bias)[:, None]
        return z @ self.encoder[0] + self.bias

    def encode(self, x: Float[Tensor, "row site d_model"]) -> Float[Tensor, "row code feature"]:
        """Codes of states, all sites of the dictionary in its order."""
        found = self.before(self.normalised(x)).relu()
        if self.shape.activation == "relu":
            return found
        weighed = found * self.weights
        if self.shape.activation == "topk":
            return keep_largest(found, weighed, self.shape.k)
        return found * (weighed > self.threshold)

    def added(self, codes: Float[Tensor, "row code feature"]) -> Float[Tensor, "row site d_model"]:
        """What codes add: f D, in the unit of z."""
        if self.shared:
            flat = codes[:, 0] @ self.decoder.transpose(0, 1).flatten(1)
            return flat.unflatten(-1, (len(self.decoder), -1))
        return codes @ self.decoder[0]

    def decode(self, codes: Float[Tensor, "row code feature"]) -> Float[Tensor, "row site d_model"]:
        """States from codes."""
        return self.added(codes) * self.scale[:, None] + self.mean

    def forward(self, x: Float[Tensor, "row site d_model"]) -> Float[Tensor, "row site d_model"]:
        """What it gives back of states."""
        return self.decode(self.encode(x))

    def directions(self, feature: int) -> Float[Tensor, "site d_model"]:
        """What a code of 1 adds to the states."""
        check_count("feature", feature, least=0, most=self.shape.n_features - 1)
        return (self.decoder[:, feature] * self.scale[:, None]).expand(len(self.origin.sites), -1)

    @torch.no_grad()
    def fold(self) -> None:
        """Let every feature weigh 1: codes grow by what directions lose. What it gives back stays the same."""
        weights = self.weights.clamp(min=1e-12)
        self.encoder *= weights
        self.bias *= weights
        self.decoder /= weights[:, None]

    def _check(self, x: Tensor) -> None:
        wanted = [len(self.origin.sites), self.decoder.shape[-1]]
        if x.ndim != 3 or list(x.shape[1:]) != wanted:
            raise UsageError(f"a dictionary reads [row, site, d_model] = [.., {wanted[0]}, {wanted[1]}], got "
                             f"{list(x.shape)}; gather its sites, dictionary.origin.sites")  # fmt: skip

    # --- on disk ---

    def check(self, m: HookedLoopMDM) -> None:
        """UsageError unless it is of this model."""
        self.origin.model.check(m, f"the dictionary ({self.shape.kind}, {self.shape.n_features} features)")

    def save(self, folder: Path | str, dtype: torch.dtype = torch.float16) -> None:
        """Write weights, encoder and decoder in `dtype`, and a record beside them that holds their hash.

        A break between the two leaves weights that the record beside them refuses.
        """
        folder = Path(folder)
        tensors = {
            name: value.detach().to("cpu", dtype if name in LARGE else torch.float32).contiguous().clone()
            for name, value in self.state_dict().items()
        }
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise NotFiniteError(f"{name} of the dictionary is beyond the range of {dtype}; save in float32")
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / FILE, tensors, {"format": "pt"})
        told = {"shape": asdict(self.shape), WEIGHTS_HASH: sha256(folder / FILE), "origin": asdict(self.origin)}
        write_json(folder / RECORD, told)

    @classmethod
    def open(cls, folder: Path | str, m: HookedLoopMDM | None = None) -> "Dictionary":
        """What `save` wrote; UsageError where it did not, and for another model than `m`, if that is given."""
        folder = Path(folder)
        if not (is_file(folder / FILE) and is_file(folder / RECORD)):
            raise UsageError(
                f"{folder} holds no dictionary ({FILE}, {RECORD}); `loopmdm dictionary MODEL --out FOLDER` trains "
                f"one, shipped with one: {', '.join(list_dictionaries())}"
            )
        told = read_json(folder / RECORD)
        try:
            if told.get(WEIGHTS_HASH, now := sha256(folder / FILE)) != now:
                raise ValueError(f"{FILE} is not what {RECORD} was written for")
            origin = told["origin"]
            found = Origin(**(origin | {"model": Identity(**origin["model"]), "sites": tuple(origin["sites"])}))
            tensors = {name: value.float() for name, value in load_file(folder / FILE).items()}
            made = cls(Shape(**told["shape"]), found, tensors["means"].shape[-1])
            made.load_state_dict(tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())
            raise UsageError(f"the dictionary in {folder} is damaged ({why:.80}); train it again") from error
        if m is not None:
            made.check(m)
        return made.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name: Path | str, m: HookedLoopMDM | None = None) -> "Dictionary":
        """By the name of a shipped model that has one (`list_dictionaries`), a folder, or a hub id; as `open`."""
        return cls.open(resolve(name), m)


def keep_largest(values: Tensor, by: Tensor, k: int) -> Tensor:
    """`values` [..., feature] where `by` is among the k largest of its row, else 0."""
    best = by.topk(min(k, by.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, best, values.gather(-1, best))

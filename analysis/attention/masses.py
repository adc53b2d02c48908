"""Attention between masked and clean positions, reduced while the model runs.

For a layer application and head with pattern A [query, key], keys are `self`, `masked` (others) or
`clean` (others), and their masses sum to 1 for every query:

    mass(Q -> K)  = mean over queries in Q of sum over keys in K of A, then over sequences
    chance(Q -> K) = mean share of keys in K among the real keys;  lift = mean mass / mean chance
    log_odds(Q)   = log[(mass_masked / chance_masked) / (mass_clean / chance_clean)], self excluded
    content(Q -> K) = mean norm of sum over K of A (v - mean_K v) W_O

log_odds 0 means that the head does not care whether a key is masked. These definitions are ours;
the paper's are not public. Only sums per sequence are kept: memory does not grow with loops.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopmdm_model import stats
from loopmdm_model.errors import UsageError, check_count
from loopmdm_model.hooked import HookedLoopMDM
from loopmdm_model.masking import MaskedBatch
from loopmdm_model.names import parse_loop

QUERY_GROUPS = ("masked", "clean")
KEY_GROUPS = ("self", "masked", "clean")


@dataclass
class GroupSums:
    """Per-sequence means of one batch, by application.

    `mass` and `content` map the application's prefix to [batch, head, query group, key group];
    `chance` is [batch, query group, key group]; NaN where a sequence has no such query.
    """

    masked: Tensor
    real: Tensor
    weight: Callable[[int], Tensor]
    with_content: bool
    mass: dict[str, Tensor] = field(default_factory=dict)
    content: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        """Weights over queries, and membership of keys."""
        groups = torch.stack([self.masked & self.real, ~self.masked & self.real], dim=-1).float()
        self.keys = groups
        self.queries = groups / groups.sum(dim=1, keepdim=True).clamp(min=1)
        self.empty = groups.sum(dim=1) == 0
        n_keys = self.real.sum(-1, keepdim=True).float()
        counts = groups.sum(dim=1)
        own = torch.eye(2, device=groups.device)
        others = (counts[:, None, :] - own) / n_keys[..., None]
        self.chance = torch.cat([(1 / n_keys)[..., None].expand(-1, 2, -1), others], dim=-1)
        self.chance = self.chance.masked_fill(self.empty[..., None], float("nan"))

    def see_values(self, value: Tensor, hook: object) -> None:
        """Hook at attn.hook_v: kept until the pattern of the same application comes."""
        self.values[_prefix(hook)] = value

    def see_pattern(self, pattern: Tensor, hook: object) -> None:
        """Hook at attn.hook_pattern [batch, head, query, key]: reduce to group means."""
        prefix = _prefix(hook)
        own = pattern.diagonal(dim1=-2, dim2=-1).float()[..., None] * self.keys[:, None]
        others = (pattern @ self.keys[:, None].to(pattern.dtype)).float() - own
        mass = torch.cat([own.sum(-1, keepdim=True), others], dim=-1)
        self.mass[prefix] = self._mean(mass)
        if self.with_content:
            self.content[prefix] = self._mean(self._content(pattern, others, self.values.pop(prefix), prefix))

    def _mean(self, per_query: Tensor) -> Tensor:
        mean = torch.einsum("bqg,bhqk->bhgk", self.queries, per_query)
        return mean.masked_fill(self.empty[:, None, :, None], float("nan"))

    def _content(self, pattern: Tensor, mass: Tensor, value: Tensor, prefix: str) -> Tensor:
        """Norms [batch, head, query, key group]; `self` is one key and moves no content: 0."""
        v = value.float().transpose(1, 2)[..., None] * self.keys[:, None, :, None, :]
        counts = self.keys.sum(dim=1)[:, None, None, :]
        flat = v.flatten(-2)
        diagonal = pattern.diagonal(dim1=-2, dim2=-1).float()[..., None, None]
        moved = (pattern.float() @ flat).unflatten(-1, v.shape[-2:]) - diagonal * v
        inside = self.keys[:, None]
        centre = (v.sum(dim=2, keepdim=True) - v) / (counts - inside).clamp(min=1)[..., None, :]
        moved = moved - mass[..., None, :] * centre
        gram = self.weight(int(prefix.split(".")[-2]))
        squared = torch.einsum("bhqdk,hde,bhqek->bhqk", moved, gram, moved)
        norms = squared.clamp(min=0).sqrt()
        return torch.cat([torch.zeros_like(norms[..., :1]), norms], dim=-1)


def _prefix(hook: object) -> str:
    return str(getattr(hook, "name", "")).rpartition("attn.")[0]


def output_gram(m: HookedLoopMDM, layer: int) -> Tensor:
    """W_O W_O^T per head [head, d_head, d_head], so that ||z W_O||^2 = z G z^T."""
    weight = m.model.get_submodule(f"blocks.{layer}.attn.out").weight
    per_head = weight.float().T.unflatten(0, (m.cfg.n_heads, m.cfg.d_head))
    return per_head @ per_head.transpose(-1, -2)


@torch.no_grad()
def mask_attention(
    m: HookedLoopMDM,
    b: MaskedBatch,
    n_loops: int | None = None,
    content: bool = True,
    by_head: bool = True,
    clusters: np.ndarray | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Masses, chance, lift, log-odds and content by application, head, query and key group.

    Columns: n_loops segment loop layer depth head query_group key_group mask_ratio mass
    mass_with_self chance lift log_odds content n, and standard errors mass_se, log_odds_se,
    content_se (over sequences, or over `clusters` [batch] of them). `loop` is missing outside the
    loop; `mass_with_self` adds the self mass where query and key group agree; log_odds belongs to
    the query group and stands on each of its rows. Empty groups are NaN with n = 0. Without
    `by_head` heads are averaged first and `head` is missing. Queries and keys of group "masked" are
    positions that hold [MASK]; padding is left out.
    """
    n_loops = check_count("n_loops", m.cfg.max_loops if n_loops is None else n_loops)
    if not isinstance(b, MaskedBatch):
        raise UsageError("mask_attention takes a MaskedBatch; make one with m.mask(text, ratio=.5)")
    parts = [
        _sums(m, b.rows(slice(start, start + batch_size)), n_loops, content)
        for start in range(0, len(b), batch_size)
    ]
    chance = torch.cat([part.chance for part in parts]).double().numpy()
    frames = []
    for prefix in parts[0].mass:
        mass = torch.cat([part.mass[prefix] for part in parts]).double().numpy()
        moved = torch.cat([part.content[prefix] for part in parts]).double().numpy() if content else None
        frames.append(_application(m, prefix, n_loops, mass, chance, moved, by_head, clusters))
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(frame.columns.get_loc("mass"), "mask_ratio", b.mask_ratio)
    return frame


def _sums(m: HookedLoopMDM, b: MaskedBatch, n_loops: int, content: bool) -> GroupSums:
    masked = b.tokens == m.cfg.mask_token_id
    real = torch.ones_like(masked) if b.attention_mask is None else b.attention_mask != 0
    sums = GroupSums(masked, real, lambda layer: output_gram(m, layer), content)
    hooks: list = [(lambda name: name.endswith("attn.hook_pattern"), sums.see_pattern)]
    if content:
        hooks.append((lambda name: name.endswith("attn.hook_v"), sums.see_values))
    m.run_with_hooks(b.tokens, n_loops=n_loops, attention_mask=b.attention_mask, fwd_hooks=hooks)
    sums.mass = {prefix: value.cpu() for prefix, value in sums.mass.items()}
    sums.content = {prefix: value.cpu() for prefix, value in sums.content.items()}
    sums.chance = sums.chance.cpu()
    return sums


def _application(
    m: HookedLoopMDM,
    prefix: str,
    n_loops: int,
    mass: np.ndarray,
    chance: np.ndarray,
    moved: np.ndarray | None,
    by_head: bool,
    clusters: np.ndarray | None,
) -> pd.DataFrame:
    """Rows of one application from per-sequence means [n, head, query group, key group]."""
    if not by_head:
        mass = mass.mean(1, keepdims=True)
        moved = None if moved is None else moved.mean(1, keepdims=True)
    n_heads = mass.shape[1]
    chances = np.repeat(chance[:, None], n_heads, axis=1)
    columns = _columns(mass, chances, moved, clusters)
    grid = pd.MultiIndex.from_product([range(n_heads), QUERY_GROUPS, KEY_GROUPS])
    frame = pd.DataFrame({name: value.reshape(-1) for name, value in columns.items()})
    layer, loop = int(prefix.split(".")[-2]), parse_loop(prefix)
    place = {
        "n_loops": n_loops,
        "segment": m.cfg.segment(layer),
        "loop": pd.array([loop] * len(frame), dtype="Int64"),
        "layer": layer,
        "depth": m.cfg.depth(layer, loop or 0, n_loops),
        "head": pd.array(grid.get_level_values(0) if by_head else [None] * len(frame), dtype="Int64"),
        "query_group": grid.get_level_values(1),
        "key_group": grid.get_level_values(2),
    }
    return pd.concat([pd.DataFrame(place, index=frame.index), frame], axis=1)


def _columns(
    mass: np.ndarray, chance: np.ndarray, moved: np.ndarray | None, clusters: np.ndarray | None
) -> dict[str, np.ndarray]:
    mean, error, n = stats.mean_and_error(mass, clusters)
    expected, _, _ = stats.mean_and_error(chance)
    missing = ~(expected > 0)
    log_odds, log_odds_se = stats.log_ratio_and_error(
        mass[..., 1], chance[..., 1], mass[..., 2], chance[..., 2], clusters
    )
    with_self = mean.copy()
    with_self[:, 0, 1] += mean[:, 0, 0]
    with_self[:, 1, 2] += mean[:, 1, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        lift = mean / expected
    content, content_se, _ = stats.mean_and_error(np.full_like(mass, np.nan) if moved is None else moved, clusters)
    spread = lambda value: np.repeat(value[..., None], len(KEY_GROUPS), axis=-1)  # noqa: E731
    columns = {"mass": mean, "mass_se": error, "mass_with_self": with_self, "chance": expected, "lift": lift}
    columns |= {"log_odds": spread(log_odds), "log_odds_se": spread(log_odds_se)}
    columns |= {"content": content, "content_se": content_se}
    columns = {name: np.where(missing, np.nan, value) for name, value in columns.items()}
    columns["log_odds"], columns["log_odds_se"] = spread(log_odds), spread(log_odds_se)
    return columns | {"n": np.where(missing, 0, n)}

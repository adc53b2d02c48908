"""One full trajectory a sequence: losses after every loop, and every rule's criterion.

A rule of scope "sequence" changes nothing before it stops, so that any number of rules and thresholds can be
replayed exactly from one record within one forward. Scope "token" and sampling have to be run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopmdm.model import flops
from loopmdm.model.blocks import LogProbs, RowLogits
from loopmdm.model.diffusion.likelihood import Read, draws, row_sums
from loopmdm.model.errors import UsageError, check_count, check_model
from loopmdm.model.information import entropy, kl
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.precision import wide, width
from loopmdm.model.protocol import LoopedModel, core_of
from loopmdm.model.sequences import MaskedBatch, Sequences, as_batch, before_next
from loopmdm.model.stopping.halting import spread, spread_change
from loopmdm.model.stopping.rules import (
    ArgmaxStable,
    EntropyDelta,
    ExitGate,
    KLDelta,
    LensRule,
    LoopView,
    NoiseSchedule,
    SecondDifference,
    StateDelta,
    StoppingRule,
)

Data = Sequences | MaskedBatch


def default_rules(max_loops: int) -> list[StoppingRule]:
    """The rules of the literature at patience 1, state rules at masked positions, both lenses."""
    state: list[StoppingRule] = [
        kind(max_loops=max_loops, positions="masked") for kind in (StateDelta, SecondDifference)
    ]
    coda = [kind(max_loops=max_loops, patience=1) for kind in (KLDelta, EntropyDelta, ArgmaxStable)]
    direct = [kind(max_loops=max_loops, patience=1, lens="direct") for kind in (KLDelta, EntropyDelta)]
    return [*state, *coda, *direct]


def rules_for(m: LoopedModel, max_loops: int) -> list[StoppingRule]:
    """The default rules as they fit a model: at all positions where none is masked, its own gate if it has one."""
    rules = default_rules(max_loops)
    if not m.facts.grouped:
        rules = [replace(rule, positions="all") for rule in rules]
    if m.facts.gated:
        rules.append(ExitGate(max_loops=max_loops, positions="masked" if m.facts.grouped else "all"))
    return rules


def rule_name(rule: StoppingRule) -> str:
    """Its name on the command line, with what differs from the usual: "kl-delta direct", "state-delta token"."""
    name = vars(type(rule)).get("name") or type(rule).__name__  # its own: a rule made from another is another
    name += " direct" if isinstance(rule, LensRule) and rule.lens == "direct" else ""
    return f"{name} token" if rule.scope == "token" else name


@dataclass(frozen=True)
class LoopRecord:
    """What happened after every loop: row r is one sequence under one mask.

    `losses` and `correct` [loop, row]: mean cross-entropy (nats) and share right over the row's masked positions,
    or of a causal model's next tokens, where mask ratio and noise are 0; `criteria` by rule, each [loop, row];
    `n_masked` [row]; `mask_ratio` [row], the share of maskable positions that are masked, and `noise` [row], the
    share of real ones, which is what `NoiseSchedule` looks at (they differ where a prompt is condition);
    `clusters` [row].
    """

    losses: Float[Tensor, "loop row"]
    correct: Float[Tensor, "loop row"]
    criteria: dict[str, Float[Tensor, "loop row"]]
    rules: dict[str, StoppingRule]
    n_masked: Int[Tensor, " row"]
    mask_ratio: Float[Tensor, " row"]
    noise: Float[Tensor, " row"]
    clusters: np.ndarray
    cfg: LoopMDMConfig
    length: int

    @property
    def max_loops(self) -> int:
        """Loops recorded."""
        return len(self.losses)

    def flops(self, rule: StoppingRule | None = None) -> Float[Tensor, "loop row"]:
        """Cost of a forward that stops after each loop and reads the masked positions; `rule` reads every loop."""
        cfg, length = self.cfg, self.length
        loops = torch.arange(1, self.max_loops + 1, dtype=torch.float64)[:, None]
        lens = None if rule is None else rule.reads
        reading = torch.zeros(len(self.n_masked), dtype=torch.float64)
        if lens is not None:
            layers = cfg.n_coda_layers if lens == "coda" else 0
            reading = layers * cfg.layer_flops(length) + cfg.unembedding_flops(self.n_masked)
        ends = flops.readout_flops(cfg, length, self.n_masked, coda=lens != "coda")
        ends = ends + cfg.n_prelude_layers * cfg.layer_flops(length)
        return loops * (cfg.n_loop_layers * cfg.layer_flops(length) + reading) + ends

    def at(self, values: Tensor, loops: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """`values` [loop, row] after each row's own number of loops."""
        return values.gather(0, (loops - 1)[None])[0]


def record_loops(
    m: LoopedModel,
    data: Tensor | Sequences | MaskedBatch,
    rules: Sequence[StoppingRule] | None = None,
    max_loops: int | None = None,
    n_samples: int = 2,
    maskable: Tensor | None = None,
    clusters: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LoopRecord:
    """Run every sequence to `max_loops` (default S_max) and keep what any rule would have seen.

    `data` are clean tokens, masked as in the NELBO (`n_samples` masks a sequence), or a MaskedBatch as it is.
    """
    read = Read(max_loops, None, n_samples, seed, batch_size)
    return record(m, as_data(m, data, maskable, clusters), rules, read)


def as_data(
    m: LoopedModel, data: Tensor | Data, maskable: Tensor | None = None, clusters: np.ndarray | None = None
) -> Data:
    """Sequences that `m` can read, or the MaskedBatch that `data` is."""
    check_model(m, "a record")
    if isinstance(data, MaskedBatch):
        return as_batch("a record", data, clusters)
    sequences = Sequences.of(data, maskable, clusters=clusters)
    return sequences if m.facts.causal else sequences.clean_for(m)


def named_rules(rules: Sequence[StoppingRule], most: int) -> dict[str, StoppingRule]:
    """Rules by name; UsageError for those that a record of `most` loops cannot replay."""
    if not isinstance(rules, Sequence) or not all(isinstance(rule, StoppingRule) for rule in rules):
        raise UsageError(f"rules must be a list of stopping rules, such as StateDelta(..), got {rules!r:.60}")
    named = {rule_name(rule): rule for rule in rules}
    for name, rule in named.items():
        if rule.scope == "token":
            raise UsageError(f'{name}: scope "token" changes the trajectory; run it with m.run(stop=...)')
        if rule.max_loops > most:
            raise UsageError(f"{name} may run {rule.max_loops} loops, the record has {most}; raise max_loops")
    if len(named) < len(rules):
        raise UsageError("two rules have one name; give each kind once, thresholds are swept")
    return named


@torch.no_grad()
def record(m: LoopedModel, data: Data, rules: Sequence[StoppingRule] | None, read: Read) -> LoopRecord:
    """`record_loops` of what `as_data` gives, to `read.n_loops` loops."""
    most = check_count("max_loops", m.cfg.max_loops if read.n_loops is None else read.n_loops)
    named = named_rules(rules_for(m, most) if rules is None else rules, most)
    batches = masked_draws(m, data, read)
    losses, correct, counts, ratios, noise = [], [], [], [], []
    criteria: dict[str, list[Tensor]] = {name: [] for name in named}

    def work(part: MaskedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        seen, nobody = _Recorder(named, part, _reader(m, part), m.facts.causal), torch.zeros_like(part.masked)
        m.run(part.tokens, most, attention_mask=part.attention_mask, rows=nobody, on_loop=seen)
        told = {name: torch.stack(values).cpu() for name, values in seen.criteria.items()}
        return torch.stack(seen.losses).cpu(), torch.stack(seen.correct).cpu(), told

    for batch in batches:
        for _, part, (loss, right, told) in batch.each(read.batch_size, work):
            losses.append(loss)
            correct.append(right)
            for name in named:
                criteria[name].append(told[name])
            counts.append(part.masked.sum(-1).cpu())
            hidden = counts[-1].double() * (not m.facts.causal)
            ratios.append(hidden / part.sequences.lengths.cpu())
            noise.append(hidden / part.real.sum(-1).cpu())
    joined = {name: torch.cat(values, dim=1) for name, values in criteria.items()}
    return LoopRecord(
        torch.cat(losses, 1), torch.cat(correct, 1), joined, named, torch.cat(counts), torch.cat(ratios),
        torch.cat(noise), np.tile(data.owners, len(batches)), m.cfg, data.tokens.shape[1],
    )  # fmt: skip


def masked_draws(m: LoopedModel, data: Data, read: Read) -> list[MaskedBatch]:
    """`data` masked as in the NELBO, a batch a draw, or as it is; every sequence has something to predict.

    Of a causal model: every token that has a next one counts as masked, and that one is what is predicted.
    """
    if m.facts.causal:
        return [before_next(data)]
    if isinstance(data, MaskedBatch):
        if not bool(data.masked.any(-1).all()):
            raise UsageError("a sequence has no masked position: nothing to read; leave it out")
        return [data]
    if not bool(data.allowed.any(-1).all()):
        raise UsageError("a sequence has nothing maskable; leave it out")
    return [batch for batch, _ in draws(m, data, read)]


def _reader(m: LoopedModel, part: MaskedBatch) -> Callable[[Tensor, str], RowLogits]:
    """What a state would answer at the masked positions, by a lens; nobody listens to it."""
    core = core_of(m)
    context = core.context(part.tokens, part.attention_mask)

    def read(state: Tensor, lens: str) -> RowLogits:
        if lens == "coda":
            return core.read(state, context, rows=part.masked)
        return RowLogits.of(lambda some: core.unembedding(state, rows=some), part.masked, core.cfg.d_vocab)

    return read


class _Recorder:
    """Called after every loop; a read-out's probabilities are computed once for all who look at them."""

    def __init__(
        self,
        rules: dict[str, StoppingRule],
        part: MaskedBatch,
        read: Callable[[Tensor, str], RowLogits],
        causal: bool,
    ):
        self.rules, self.part, self.read = rules, part, read
        clean = part.clean if causal else part.truth("a record of losses")  # a next token may be the same again
        self.truth = clean[part.masked]
        self.losses: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.criteria: dict[str, list[Tensor]] = {name: [] for name in rules}
        self.before: dict[str, Tensor | None] = dict.fromkeys(rules)
        self.answers: dict[str, Answers] = {}

    def __call__(self, view: LoopView) -> None:
        assert view.read is not None
        masked, truth = self.part.masked, self.truth
        last, self.answers = self.answers, {}
        lenses = {"coda"} | {rule.lens for rule in self.rules.values() if isinstance(rule, LensRule)}
        for lens in sorted(lenses):
            self.answers[lens] = Answers.of(self.read(view.state, lens), last.get(lens), truth)
        answers, count = self.answers["coda"], masked.sum(-1)
        self.losses.append(row_sums(answers.nats.double(), self.part) / count)
        self.correct.append(row_sums((answers.top == truth).double(), self.part) / count)
        for name, rule in self.rules.items():
            value = self._lens(name, rule, view, last) if isinstance(rule, LensRule) else rule.criterion(view)
            if value is None:
                value = torch.full((len(masked),), float("nan"))
            self.criteria[name].append(wide(value))

    def _lens(self, name: str, rule: LensRule, view: LoopView, last: dict[str, "Answers"]) -> Tensor:
        rows = rule.group(view.masked, view.real)
        if type(rule) in SHARED and torch.equal(rows, self.part.masked):
            found = SHARED[type(rule)](self.answers[rule.lens], last[rule.lens]) if last else None
            return rule.reduce(spread(found, rows), rows)
        assert view.read is not None
        reading, before = rule.read(view.read(rule.lens, rows)), self.before[name]
        self.before[name] = reading
        return rule.reduce(spread_change(rule, reading, before, rows), rows)


BLOCK = 2**18
"""Numbers worked on at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Answers:
    """One read-out: by row the best token `top`, the `entropy`, the `kl` to the last one, the truth's `nats`."""

    log_probs: LogProbs
    top: Int[Tensor, " row"]
    entropy: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]
    nats: Float[Tensor, " row"]

    @classmethod
    def of(cls, reading: RowLogits, before: "Answers | None", truth: Int[Tensor, " row"]) -> "Answers":
        """From logits, as the rules would compute it, block by block of rows."""
        parts, log_probs = [], LogProbs(reading)
        for span in reading.spans:
            last = None if before is None else before.log_probs[span]
            block, *numbers = _answered(reading[span], last, truth[span])
            parts.append(numbers)
            if reading.whole is not None:
                log_probs = LogProbs.held(reading, block)
        return cls(log_probs, *(torch.cat(column) for column in zip(*parts, strict=True)))


def _answered(logits: Tensor, before: Tensor | None, truth: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities, best tokens, entropies, divergences from `before`, and nats of the truth."""
    log_probs, parts = torch.empty_like(logits, dtype=width(logits.dtype)), []
    size = max(1, BLOCK // logits.shape[-1])
    for start in range(0, len(logits), size):
        span = slice(start, start + size)
        block = wide(logits[span]).log_softmax(-1)
        log_probs[span], p = block, block.exp()
        divergence = torch.full_like(block[:, 0], float("nan"))
        if before is not None:
            divergence = kl(block, before[span], p).clamp_(min=0.0)
        # By numpy, as torch's argmax is many times slower.
        top = torch.from_numpy(block.cpu().numpy().argmax(-1)).to(block.device)
        parts.append((top, entropy(block, p), divergence))
    nats = -log_probs.gather(-1, truth[:, None].long())[:, 0]
    return log_probs, *(torch.cat(column) for column in zip(*parts, strict=True)), nats


SHARED: dict[type[StoppingRule], Callable[[Answers, Answers], Tensor]] = {
    KLDelta: lambda now, before: now.kl,  # noqa: ARG005
    EntropyDelta: lambda now, before: (now.entropy - before.entropy).abs(),
    ArgmaxStable: lambda now, before: (now.top != before.top).float(),
}
"""What these rules' `read` and `change` come to."""


def noise_bins(record: LoopRecord, n_bins: int) -> Int[Tensor, " row"]:
    """The bin of a `NoiseSchedule` with `n_bins` counts that each row falls into."""
    return (record.noise * n_bins).ceil().long().sub(1).clamp(0, n_bins - 1)


def noise_schedule(record: LoopRecord, price: float, n_bins: int = 5) -> NoiseSchedule:
    """The loops by mask ratio that minimise mean loss + price * FLOPs on this record (fit it on validation).

    Empty bins take the count of the nearest bin that has rows.
    """
    place = noise_bins(record, n_bins)
    cost = record.losses + price * record.flops()
    best = {int(number): int(cost[:, place == number].mean(1).argmin()) + 1 for number in place.unique().tolist()}
    loops = [best[min(best, key=lambda known: abs(known - number))] for number in range(n_bins)]
    return NoiseSchedule(loops=tuple(loops), max_loops=record.max_loops)

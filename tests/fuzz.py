"""Bad inputs by the thousand, drawn by Hypothesis: of the command line and of files (calls: fuzz_calls.py).

Each input is wrong by construction, or may be wrong. What is wrong must end in exit code 2 and one line (of the
Python API: in a UsageError), with nothing written; what is fine must end in 0.
"""

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SMOKE = str(ROOT / "figures/specs/smoke.toml")
MODEL = "markov-loop"
HUGE = 2**63
WORDS = st.sampled_from(["x", "1.5", "nan", "-", "1e9", "0x1g", "one", "[1]", "1,", "None", "1 2", "½", "💥"])
NAMES = st.text(st.characters(exclude_characters="\0/\\", exclude_categories=["Cs"]), min_size=1, max_size=40)
NAMES = NAMES.filter(lambda name: not name.startswith("-") and name.strip() not in ("list", ".", ".."))
UNKNOWN = NAMES.map(lambda name: f"{name}?").filter(lambda name: not name.startswith(("files:", "hub:")))
"""Names of nothing: Hypothesis draws words of the sources, too."""
BRACKETS = st.sampled_from(["[" * 50_000, "{a=" * 3_000 + "1" + "}" * 3_000, "9" * 5_000])


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with size and time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


# --- the command line: one wrong word in a command that is fine without it ---


def counts(least: int = 1, most: int = 2**31 - 1) -> st.SearchStrategy[str]:
    """What is no count in `least`..`most`."""
    return st.one_of(st.integers(max_value=least - 1).map(str), st.integers(min_value=most + 1).map(str), WORDS)


def lists(words: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A wrong word in a comma-separated list of good ones."""
    return words.map(lambda word: f"1,{word}" if word not in ("1,",) else "1,,2")


def numbers(*good: tuple[float, float]) -> st.SearchStrategy[str]:
    """Numbers outside all of these closed ranges, and what is none."""
    wrong = st.floats().filter(lambda value: not any(low <= value <= high for low, high in good))
    return st.one_of(wrong.map(repr), st.sampled_from(["x", "", "1,5", "one"]))


SEEDS = counts(0, HUGE - 1)
DIALS = ("threshold", "factor", "entropy-bound")
SAMPLE = {
    "--n": counts(), "--steps": counts(), "--batch-size": counts(), "--n-loops": counts(most=10_000),
    "--length": counts(most=32), "--first-index": SEEDS, "--seed": SEEDS,
    "--temperature": numbers((0.0, 0.0), (1e-4, sys.float_info.max)), "--top-p": numbers((5e-324, 1.0)),
    "--stop": st.one_of(UNKNOWN, numbers((0.0, float("inf"))).filter(bool).map("state-delta:{}".format)),
    "--order": st.one_of(
        UNKNOWN, counts().map(lambda word: f"blocks:{word}"), st.just(""),
        st.tuples(st.sampled_from(DIALS), WORDS.filter(lambda word: word not in ("1.5", "1e9"))).map(":".join),
        st.sampled_from(["threshold:1.5", "threshold:-1", "random:0.5", "blocks:8:threshold:2", "blocks:8:x"]),
    ),
    "--top-k": counts(), "--guidance": numbers((0.0, sys.float_info.max)),
    "--suppress": st.one_of(lists(counts(0, 5)), st.just("0,1,2,3,4,5")), "--end": lists(counts(0, 5)),
    "--infill": NAMES.filter(lambda name: "[MASK]" not in name), "--prompt": UNKNOWN,
    "--device": UNKNOWN, "--dtype": UNKNOWN,
    "--set": st.one_of(NAMES.filter(lambda name: "=" not in name), UNKNOWN.map(lambda name: f"{name}=1")),
    "--clues": st.one_of(
        counts(0, 31).map(lambda word: f"{word}:0"),
        counts(0, 5).filter(lambda word: word != "1,").map(lambda word: f"0:{word}"),
        st.sampled_from(["0:0,0:1", "0=1", ":", "::", "0:1:2", "1:"]),
        NAMES.filter(lambda name: name.strip(",") and ":" not in name),
    ),
    "--out": st.sampled_from([".", "/", "a" * 300, "made/fifo", "made/folder"]),
}  # fmt: skip
EVALUATE = {
    "--n-loops": lists(counts(most=10_000)), "--n-samples": counts(), "--n": counts(), "--measure": UNKNOWN,
    "--n-clues": lists(counts(0)), "--steps": lists(counts()),
}  # fmt: skip
SHARES = numbers((0.0, 1.0)).filter(lambda word: word != "1,5")
MEASURE = {
    "--n": counts(), "--n-loops": counts(most=10_000), "--seed": SEEDS, "--along-sampling": counts(0),
    "--mask-ratios": SHARES, "--out": st.sampled_from([".", "x.tsv", "a" * 300 + ".parquet", "made/folder"]),
}  # fmt: skip
OWN = ("n_draws", "n_bins", "n_resamples", "first")
OPENED = {name: SAMPLE[name] for name in ("--device", "--dtype", "--set")}
TRAINING_FREE = OPENED | {
    "--blocks": st.one_of(
        WORDS, counts(0, 5).map(lambda word: f"{word}:1"), counts(1, 5).map(lambda word: f"0:{word}")
    ),
    "--n-loops": lists(counts(most=10_000)), "--n-samples": counts(), "--n": counts(), "--seed": SEEDS,
    "--out": MEASURE["--out"], "--text": UNKNOWN,
}  # fmt: skip
REPORT = OPENED | {"--out": st.sampled_from([".", "x.txt", "made/folder", "a" * 300 + ".html"])}
REPORT |= {"--text": UNKNOWN}
RATES = numbers((5e-324, sys.float_info.max)).map(lambda word: word or '""')
SETTINGS = {
    "training.batch_size": counts(), "training.steps": counts(), "training.tokens": counts(0, HUGE - 1),
    "training.threads": counts(most=os.cpu_count() or 1), "training.accumulate": counts(),
    "training.warmup_steps": counts(0), "training.curve_points": counts(), "training.curve_sequences": counts(),
    "training.learning_rate": RATES, "training.clip": RATES, "training.ema": numbers((0.0, 0.9999999999999999)),
    "training.flops": st.sampled_from(["1e300", "inf", "nan", "-1", "0", "true", "1e30", str(10**400)]),
    "model.d_model": counts(most=2**20), "model.d_mlp": counts(most=2**24), "model.n_heads": counts(most=2**16),
    "model.max_loops": counts(most=10_000), "model.n_loop_layers": counts(0, 1000), "model.eps": RATES,
    "model.initializer_range": RATES, "model.rotary_base": RATES, "model.act_fn": UNKNOWN,
    "seed": counts(0, 2**32 - 1),
    "data.d_vocab": counts(2, 2**26), "data.length": counts(2, 2**24), "data.corpus": UNKNOWN, "name": BRACKETS,
    "model": NAMES, "training.match": UNKNOWN, "loops.distribution": UNKNOWN, "nowhere.at.all": NAMES,
}  # fmt: skip


def _options(command: list[str], options: dict[str, st.SearchStrategy[str]]) -> st.SearchStrategy[list[str]]:
    """The command with one of its options given wrongly."""
    drawn = [
        strategy.map(lambda word, name=name: [*command, f"{name}={word}"]) for name, strategy in options.items()
    ]
    return st.one_of(drawn)


def _words(*command: str) -> st.SearchStrategy[list[str]]:
    """The command with a name that does not exist."""
    return NAMES.map(lambda name: [*command, f"{name}?"])


NAMED = (
    "",
    "train",
    "sample",
    "evaluate",
    "measure",
    "measure effective-rank",
    "table",
    "figures",
    "data fetch",
    "data prepare",
    "ship",
    "bench",
    "training-free",
    "report",
    "claims",
)
COMMANDS = st.one_of(
    _options(["sample", MODEL, "--steps=1"], SAMPLE),
    _options(["evaluate", MODEL], EVALUATE),
    _options(["measure", "effective-rank", MODEL, "--n=2"], MEASURE),
    _options(["training-free", MODEL, "--n=2"], TRAINING_FREE),
    _options(["report", MODEL], REPORT),
    st.tuples(st.sampled_from(OWN), counts()).map(
        lambda pair: ["measure", "causal-edges", MODEL, "--n=2", f"--set={pair[0]}={pair[1]}"]
    ),
    st.one_of([
        strategy.map(lambda word, key=key: ["train", SMOKE, "--dry-run", f"--set={key}={word}"])
        for key, strategy in SETTINGS.items()
    ]),
    counts(0, 2**32 - 1).map(lambda word: ["train", SMOKE, "--dry-run", f"--seed={word}"]),
    *(_words(*words.split()) for words in NAMED),
    counts(0).map(lambda word: ["claims", f"--seeds={word}"]),
    NAMES.map(lambda name: ["report", f"--out={name}.txt"]),
    NAMES.map(lambda name: ["lm-eval", f"--model={MODEL}", f"--tasks={name}?.yaml"]),
)  # fmt: skip


# --- files: a model's folder, a spec ---

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([10**400, -(2**63), 2**31, [], {}, [[]], "loop", ["loop"], [3], 1e308]),
)  # fmt: skip
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
TEXT = st.one_of(
    st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000, b"\xff\xfe", b"", b"a = " + b"[" * 50_000]),
)  # fmt: skip
PARTS = ("config.json", "train.json", "tokenizer.json", "model.safetensors")
KEYS = tuple(json.loads((ROOT / f"loopmdm_model/zoo/{MODEL}/config.json").read_text()))
FILES = st.one_of(
    st.tuples(st.sampled_from(PARTS), TEXT),
    st.tuples(st.sampled_from(KEYS), JSON),
    st.tuples(st.just("spec.toml"), TEXT),
)


def write_case(folder: Path, name: str, value: Any) -> list[str]:
    """Put a damaged file into a folder; the command that meets it."""
    if name == "spec.toml":
        (folder / name).write_bytes(value)
        return ["train", str(folder / name), "--dry-run"]
    model = folder / "model"
    shutil.copytree(ROOT / f"loopmdm_model/zoo/{MODEL}", model, ignore=shutil.ignore_patterns("evaluations"))
    if name in PARTS:
        (model / name).write_bytes(value)
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {name: value}))
    return ["sample", str(model), "--steps=1", "--n-loops=1"]


# --- counting ---


@dataclass
class Tally:
    """What was tried and how it ended, for the line that `make soak` prints."""

    inputs: int = 0
    ends: Counter = field(default_factory=Counter)

    def note(self, end: Any) -> None:
        """One more."""
        self.inputs += 1
        self.ends[str(end)] += 1

    def __str__(self) -> str:
        ends = ", ".join(f"{count} x {end}" for end, count in sorted(self.ends.items()))
        return f"{self.inputs} inputs: {ends}"

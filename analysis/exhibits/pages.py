"""Pages that are generated from registries and tables: figures/README.md, and blocks of other pages.

A block stands between two comments of its page, whose rest is written by hand.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import pandas as pd

from loopmdm.analysis.exhibits import EXHIBITS, Exhibit, by_theme, tables
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.analysis.exhibits.registry import asked_of
from loopmdm.analysis.plots.claims import said
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json
from loopmdm.model.network.config import LoopMDMConfig
from loopmdm.model.zoo.runs import MAIN_TASKS, Run, Zoo

HEADLINE = "who-tells-whom"
BLOCK = "<!-- generated: {0} -->\n{1}<!-- end of {0} -->"


def stale_pages(root: Path) -> list[str]:
    """Generated pages that are not what the registry and the tables give."""
    return [
        f"{path} is stale; run `make gallery`"
        for path, text in pages(root).items()
        if not path.exists() or path.read_text("utf-8") != text
    ]


def pages(root: Path) -> dict[Path, str]:
    """What the generated pages should hold; `root` is the repository."""
    alts = _alts(root)
    found = {root / "figures" / "README.md": figures_page(alts)}
    for page, blocks in BLOCKS.items():
        text = (root / page).read_text("utf-8")
        for name, block in blocks.items():
            text = _replaced(page, text, name, block(alts))
        found[root / page] = text
    return found


def _alts(root: Path) -> dict[str, str]:
    """Alternative texts of the pictures in the gallery, by figure."""
    path = root / "figures" / "gallery" / "hashes.json"
    return read_json(path)["alt"] if path.exists() else {}


def _replaced(page: str, text: str, name: str, block: str) -> str:
    first, last = BLOCK.format(name, "\0").split("\0")
    if first not in text or last not in text:
        raise UsageError(f"{page} lacks the lines {first.strip()!r} and {last.strip()!r}; put them back")
    return re.sub(
        re.escape(first) + ".*?" + re.escape(last), lambda _: BLOCK.format(name, block + "\n"), text, flags=re.S
    )


Alts = Mapping[str, str]


def headline(alts: Alts) -> str:
    """The README's picture with the beginning of its caption."""
    figure = EXHIBITS[HEADLINE]
    return f"![{alts.get(HEADLINE, figure.finding)}](figures/gallery/{HEADLINE}.png)\n\n*{figure.lead}*"


def claims_block(_: Alts) -> str:
    """A line a claim and task: verdict, estimate with interval and unit, seeds."""
    lines = ["| claim | task | verdict | estimate (95%), seeds |", "|---|---|---|---|"]
    shown = claims.claims_table()
    for claim in dict.fromkeys(shown["claim"]):
        part = shown[shown["claim"] == claim]
        for place, row in enumerate(part.itertuples()):
            asked = f"{row.text} (`{claim}`)" if not place else ""
            lines.append(f"| {asked} | {row.task} | {row.verdict} | {said(row)} |")
    return "\n".join(lines)


def models_block(_: Alts) -> str:
    """A table a task: arms with layers, parameters, S_max, seeds and test NELBO."""
    zoo, df = Zoo.shipped(), tables.load("nll-by-loops")
    found = df[df["n_loops"] == df["max_loops"]].set_index("model")["nll"]
    parts = []
    for task in dict.fromkeys((*MAIN_TASKS, *(run.task for run in zoo))):
        arms: dict[str, list[Run]] = {}
        for run in zoo.select(task=task):
            arms.setdefault(run.file, []).append(run)
        lines = [f"## {task}: {arms[next(iter(arms))][0].spec.training.flops:.0e} FLOPs a run".replace("e+", "e")]
        lines += ["", "| arm | layers | parameters | S_max | seeds | test NELBO |", "|---|---|---|---|---|---|"]
        lines += [_arm(name, runs, found) for name, runs in arms.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _arm(name: str, runs: list[Run], found: pd.Series) -> str:
    cfg = runs[0].spec.config
    values = sorted(float(found[run.name]) for run in runs if run.name in found)
    told = f"{median(values):.3f}" if values else ""
    if len(values) > 1:
        told += f" ({values[0]:.3f} to {values[-1]:.3f})"
    layers = f"{cfg.n_prelude_layers} + {cfg.n_loop_layers}{' x S' * (cfg.max_loops > 1)} + {cfg.n_coda_layers}"
    return f"| `{name}` | {layers} | {_size(cfg)} | {cfg.max_loops} | {len(runs)} | {told} |"


def _size(cfg: LoopMDMConfig) -> str:
    from loopmdm.model.network.model import LoopMDM

    return f"{LoopMDM(cfg).n_parameters / 1e6:.2f} M"


def figures_page(alts: Alts) -> str:
    """figures/README.md: every figure with its finding, claims, caption, tables and command."""
    by_figure: dict[str, list[str]] = {}
    for claim in claims.load_claims():
        by_figure.setdefault(claim.figure, []).append(f"{claim.claim} (`{claim.name}`)")
    parts = [
        "# The figures\n",
        "Every figure of the study, as drawn from the committed tables of the shipped models. This page and the",
        "pictures are generated (`make gallery`) and held against the tables by `loopmdm figures --check`.\n",
    ]
    for title, shown in by_theme().items():
        parts.append(f"## {title}\n")
        parts += [_entry(figure, by_figure.get(figure.name, []), alts) for figure in shown]
    return "\n".join(parts).rstrip() + "\n"


def _entry(figure: Exhibit, asked: list[str], alts: Alts) -> str:
    rows = ", ".join(f"`{name}`" for name in figure.tables)
    asked_for = asked_of(figure.load())
    alt = alts.get(figure.name, figure.finding)
    lines = [f"### {figure.name}\n", f"**{figure.finding}**\n", f"![{alt}](gallery/{figure.name}.png)\n"]
    lines += [f"{figure.lead}\n"]
    lines += ["<details><summary>more</summary>\n"]
    lines += [f"{figure.rest}\n"] if figure.rest else []
    lines += ["Claims: " + "; ".join(asked) + ".\n"] if asked else []
    told = f" Asked: {asked_for}." if asked_for else ""
    lines += [f"Tables: {rows}.{told} Command: `loopmdm figures {figure.name}`.\n", "</details>\n"]
    return "\n".join(lines)


BLOCKS: dict[str, dict[str, Callable[[Alts], str]]] = {
    "README.md": {"headline": headline},
    "docs/results.md": {"claims": claims_block},
    "docs/models.md": {"models": models_block},
}
"""Pages with generated blocks."""

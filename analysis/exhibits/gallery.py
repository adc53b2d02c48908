"""What the repository shows of the figures: figures/gallery, figures/README.md and two blocks of the README.

All of it is generated from the registry and the tables, and `stale` says where it no longer is what they give.
"""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from loopmdm.analysis.exhibits import EXHIBITS, Exhibit, by_theme, tables
from loopmdm.analysis.exhibits import verdicts as claims
from loopmdm.analysis.exhibits.measuring import table
from loopmdm.analysis.exhibits.registry import asked_of
from loopmdm.analysis.numbers import provenance
from loopmdm.analysis.plots.claims import said
from loopmdm.analysis.plots.style import FORMATS
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, write_atomic, write_json
from loopmdm.model.training.record import versions
from loopmdm.model.zoo.runs import MAIN_TASKS

HEADLINE = "mask-to-mask-by-loop"
HASHES = "hashes.json"
LARGE = 190_000
"""Bytes of a picture that are a lot in a repository."""
SHADE = 40
"""Largest difference of a colour, of 255, that is no difference."""
BLOCK = "<!-- generated: {0} -->\n{1}<!-- end of {0} -->"


# --- comparing pictures ---


def changed(names: Iterable[str], out: Path, gallery: Path) -> list[str]:
    """Figures drawn anew in a temporary folder against those in `out` and the gallery; a line a difference.

    Pictures in `out` are compared byte by byte; what is not there is not compared. Of the gallery the hashes of
    the tables' values must agree, and the pictures if they were drawn with the same versions.
    """
    known = _read_hashes(gallery)
    same_versions = known["versions"] == versions(provenance.DRAWING)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        for name in names:
            EXHIBITS[name].draw(out=fresh)
            found += _differences(name, fresh, out) + against_gallery(name, fresh, gallery, known, same_versions)
    return found


def outdated(names: Iterable[str]) -> list[str]:
    """Tables of these figures that are of other weights or measures than those here."""
    used = dict.fromkeys(used for name in names for used in EXHIBITS[name].tables)
    return [tables.outdated(name) for name in used if not tables.is_current(table(name))]


def _differences(name: str, fresh: Path, out: Path) -> list[str]:
    files = [f"{name}.{kind}" for kind in FORMATS if (out / f"{name}.{kind}").exists()]
    return [f"{out / file} differs" for file in files if (out / file).read_bytes() != (fresh / file).read_bytes()]


def against_gallery(name: str, fresh: Path, gallery: Path, known: dict, same_versions: bool) -> list[str]:
    """What of a committed picture differs from the one drawn into `fresh`; at most one line."""
    picture = gallery / f"{name}.png"
    if name not in known["tables"] or not picture.exists():
        return [f"{picture} is missing; run `make gallery`"]
    now = read_json(fresh / f"{name}.json")["tables"]
    if now != known["tables"][name]:
        old = sorted(table for table in now if now[table] != known["tables"][name].get(table))
        return [f"{picture} is of other values of {', '.join(old) or 'its tables'}; run `make gallery`"]
    small = fresh / f"{name}-small.png"
    shrunk(fresh / f"{name}.png", small)
    if same_versions and not same_picture(picture, small):
        return [f"{picture} is not what its tables give; run `make gallery`"]
    return []


def same_picture(one: Path, other: Path) -> bool:
    """Equal but for shades, which may differ a little between processors and palettes."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (one, other))
    return a.shape == b.shape and float(np.abs(a - b).max()) <= SHADE


def shrunk(picture: Path, target: Path) -> None:
    """The picture with 256 colours, a third of the size; with 64 where that is still a lot."""
    for colours in (256, 64):  # a long text needs few, and shades of its letters cost most
        Image.open(picture).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(
            target, "PNG", optimize=True
        )
        if target.stat().st_size < LARGE:
            return


def _read_hashes(gallery: Path) -> dict:
    path = gallery / HASHES
    if not path.exists():
        raise UsageError(f"{path} is missing; run `make gallery`")
    return read_json(path)


# --- writing the gallery ---


def write_gallery(root: Path) -> None:
    """Pictures, their hashes, figures/README.md and the README's blocks; `root` is the repository."""
    gallery = root / "figures" / "gallery"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        hashes = {}
        for name, figure in EXHIBITS.items():
            figure.draw(out=fresh)
            write_atomic(gallery / f"{name}.png", lambda path, source=fresh / f"{name}.png": shrunk(source, path))
            hashes[name] = read_json(fresh / f"{name}.json")["tables"]
    for path in gallery.glob("*.png"):
        if path.stem not in EXHIBITS:
            path.unlink()
    write_json(gallery / HASHES, {"versions": versions(provenance.DRAWING), "tables": hashes})
    for path, text in pages(root).items():
        write_atomic(path, lambda target, text=text: target.write_text(text, "utf-8"))


def stale_pages(root: Path) -> list[str]:
    """Generated pages that are not what the registry and the tables give."""
    return [
        f"{path} is stale; run `make gallery`"
        for path, text in pages(root).items()
        if not path.exists() or path.read_text("utf-8") != text
    ]


def pages(root: Path) -> dict[Path, str]:
    """What the generated pages should hold."""
    readme = root / "README.md"
    text = readme.read_text("utf-8")
    for name, block in {"headline": headline(), "claims": claims_markdown(claims.claims_table())}.items():
        text = _replaced(text, name, block)
    return {root / "figures" / "README.md": gallery_page(), readme: text}


def _replaced(text: str, name: str, block: str) -> str:
    first, last = BLOCK.format(name, "\0").split("\0")
    if first not in text or last not in text:
        raise UsageError(f"README.md lacks the lines {first.strip()!r} and {last.strip()!r}; put them back")
    return re.sub(
        re.escape(first) + ".*?" + re.escape(last), lambda _: BLOCK.format(name, block + "\n"), text, flags=re.S
    )


def headline() -> str:
    """The README's picture with its caption."""
    figure = EXHIBITS[HEADLINE]
    return f"![{first_sentence(figure)}](figures/gallery/{HEADLINE}.png)\n\n*{figure.text}*"


def first_sentence(figure: Exhibit) -> str:
    """What a picture shows, for those who cannot see it."""
    return re.split(r"(?<=\.) ", figure.text, maxsplit=1)[0].rstrip(".")


def claims_markdown(df: pd.DataFrame) -> str:
    """A line a claim; a cell a task with verdict, estimate, interval and seeds."""
    lines = ["| claim | Sudoku | text (or as named) |", "|---|---|---|"]
    for claim in dict.fromkeys(df["claim"]):
        part = df[df["claim"] == claim]
        cells = []
        for _, tasks in claims.TASK_GROUPS:
            rows = [row for row in part.itertuples() if row.task in tasks]
            cells.append("; ".join(_cell(row) for row in rows))
        lines.append(f"| {part['text'].iloc[0]} (`{claim}`) | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _cell(row) -> str:
    named = "" if row.task in MAIN_TASKS else f"{row.task}: "
    return f"{named}**{row.verdict}** {said(row)}".strip()


def gallery_page() -> str:
    """figures/README.md: every figure with its claims, caption, tables and command."""
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
        parts += [_entry(figure, by_figure.get(figure.name, [])) for figure in shown]
    return "\n".join(parts).rstrip() + "\n"


def _entry(figure: Exhibit, asked: list[str]) -> str:
    rows = ", ".join(f"`{name}`" for name in figure.tables)
    lines = [f"### {figure.name}\n", f"![{first_sentence(figure)}](gallery/{figure.name}.png)\n"]
    if asked:
        lines.append("Claims: " + "; ".join(asked) + ".\n")
    asked_for = asked_of(figure.load())
    told = f" Asked: {asked_for}." if asked_for else ""
    lines += [f"{figure.text}\n", f"Tables: {rows}.{told} Command: `loopmdm figures {figure.name}`.\n"]
    return "\n".join(lines)


def repository() -> Path:
    """The root of the checkout; UsageError outside one."""
    root = tables.figures_folder().parent
    if not (root / "README.md").exists():
        raise UsageError(f"{root.resolve()} is no checkout of the repository; run this in one")
    return root

"""The pictures that the repository shows, figures/gallery: drawn from the tables, and held against them."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from loopmdm.analysis.exhibits import EXHIBITS, tables
from loopmdm.analysis.exhibits.measuring import table
from loopmdm.analysis.exhibits.pages import pages
from loopmdm.analysis.numbers import provenance
from loopmdm.analysis.plots.style import FORMATS
from loopmdm.model.errors import UsageError
from loopmdm.model.files import read_json, write_atomic, write_json
from loopmdm.model.training.record import versions

HASHES = "hashes.json"
LARGE = 190_000
"""Bytes of a picture that are a lot in a repository."""
WIDE = 1242
"""Pixels across a page."""
SHADE = 40
"""Largest difference of a colour, of 255, that is no difference."""


# --- comparing pictures ---


def changed(names: Iterable[str], out: Path, gallery: Path) -> list[str]:
    """Figures drawn anew in a temporary folder against those in `out` and the gallery; a line a difference.

    Pictures in `out` are compared byte by byte; what is not there is not compared. Of the gallery the hashes of
    the tables' values must agree, and the pictures if they were drawn with the same versions.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        for name in names:
            EXHIBITS[name].draw(out=fresh)
            found += _differences(name, fresh, out) + against_gallery(name, fresh, gallery)
    return found


def outdated(names: Iterable[str]) -> list[str]:
    """Tables of these figures that are of other weights or measures than those here."""
    used = dict.fromkeys(used for name in names for used in EXHIBITS[name].tables)
    return [tables.outdated(name) for name in used if not tables.is_current(table(name))]


def _differences(name: str, fresh: Path, out: Path) -> list[str]:
    files = [f"{name}.{kind}" for kind in FORMATS if (out / f"{name}.{kind}").exists()]
    return [f"{out / file} differs" for file in files if (out / file).read_bytes() != (fresh / file).read_bytes()]


def against_gallery(name: str, fresh: Path, gallery: Path) -> list[str]:
    """What of a committed picture differs from the one drawn into `fresh`; at most one line."""
    picture, known = gallery / f"{name}.png", _read_hashes(gallery)
    if name not in known["tables"] or not picture.exists():
        return [f"{picture} is missing; run `make gallery`"]
    sidecar = read_json(fresh / f"{name}.json")
    now = sidecar["tables"]
    if now != known["tables"][name]:
        old = sorted(table for table in now if now[table] != known["tables"][name].get(table))
        return [f"{picture} is of other values of {', '.join(old) or 'its tables'}; run `make gallery`"]
    if known["alt"].get(name) != sidecar["alt"]:
        return [f"{picture} has another alternative text; run `make gallery`"]
    small = fresh / f"{name}-small.png"
    shrunk(fresh / f"{name}.png", small)
    if known["versions"] == versions(provenance.DRAWING) and not same_picture(picture, small):
        return [f"{picture} is not what its tables give; run `make gallery`"]
    return []


def same_picture(one: Path, other: Path) -> bool:
    """Equal but for shades, which may differ a little between processors and palettes."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (one, other))
    return a.shape == b.shape and float(np.abs(a - b).max()) <= SHADE


def shrunk(picture: Path, target: Path) -> None:
    """The picture with 256 colours, a third of the size, at most `WIDE`; with fewer where that is still a lot.

    Colours are chosen by range, not by area: else those of a colour bar are lost to the shades of letters.
    """
    whole = Image.open(picture).convert("RGB")
    if whole.width > WIDE:
        whole = whole.resize((WIDE, round(whole.height * WIDE / whole.width)), Image.Resampling.LANCZOS)
    for colours in (256, 64, 16):  # a long text needs few, and shades of its letters cost most
        few = whole.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(target, "PNG", optimize=True)
        if target.stat().st_size < LARGE:
            return


def _read_hashes(gallery: Path) -> dict:
    path = gallery / HASHES
    if not path.exists():
        raise UsageError(f"{path} is missing; run `make gallery`")
    return read_json(path)


# --- writing the gallery ---


def write_gallery(root: Path) -> None:
    """Pictures, their hashes and the generated pages; `root` is the repository."""
    gallery = root / "figures" / "gallery"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        hashes, alts = {}, {}
        for name, figure in EXHIBITS.items():
            figure.draw(out=fresh)
            write_atomic(gallery / f"{name}.png", lambda path, source=fresh / f"{name}.png": shrunk(source, path))
            sidecar = read_json(fresh / f"{name}.json")
            hashes[name], alts[name] = sidecar["tables"], sidecar["alt"]
    for path in gallery.glob("*.png"):
        if path.stem not in EXHIBITS:
            path.unlink()
    write_json(gallery / HASHES, {"versions": versions(provenance.DRAWING), "tables": hashes, "alt": alts})
    for path, text in pages(root).items():
        write_atomic(path, lambda target, text=text: target.write_text(text, "utf-8"))


def repository() -> Path:
    """The root of the checkout; UsageError outside one."""
    root = tables.figures_folder().parent
    if not (root / "README.md").exists():
        raise UsageError(f"{root.resolve()} is no checkout of the repository; run this in one")
    return root

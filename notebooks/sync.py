"""Generate the .ipynb files from their text sources: no outputs, stable cell ids, byte-identical.

python notebooks/sync.py           writes them
python notebooks/sync.py --check   exits 1 if one is not what its source gives
"""

import sys
from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent


def generate(source: Path) -> str:
    """The notebook's JSON, with cell ids by position."""
    notebook = jupytext.read(source, fmt="py:percent")
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def main() -> int:
    """Write or check every numbered notebook."""
    stale = []
    for source in sorted(HERE.glob("[0-9]*.py")):
        target, text = source.with_suffix(".ipynb"), generate(source)
        if "--check" in sys.argv:
            stale += [target.name] if not target.exists() or target.read_text("utf-8") != text else []
        else:
            target.write_text(text, "utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run `python notebooks/sync.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())

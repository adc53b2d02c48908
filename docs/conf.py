"""Sphinx's settings; `build.py` gathers the sources and calls it."""

import re

from sphinx.application import Sphinx

import loopmdm

project = "loopmdm"
author = "The LoopMDM interpretability suite authors"
release = version = loopmdm.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_show_tb = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # the sidecar of a figure, beside its picture

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "loopmdm"
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "logo": {"text": "loopmdm"},
}
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
copyright = "the authors, MIT licence"

# --- docstrings ---

CODE = re.compile(r"`([^`\n]+)`")
SPECIAL = re.compile(r"([\\*|]|(?<=\w)_(?=\W|$))")
ITEM = re.compile(r"\s*([-*]|\d+\.) ")


def as_rst(lines: list[str]) -> list[str]:
    """The house's docstrings, plain text with `code` and indented blocks, as reStructuredText."""
    out: list[str] = []
    inside, example = False, False
    for line in lines:
        example = bool(line.strip()) and (example or line.startswith(">>> "))
        if example:
            out.append(line)
            continue
        indented = line.startswith("    ") and (not out or not out[-1].strip() or inside)
        if line.strip() and indented and not inside:
            out += ["", ".. code-block:: text", ""]
            inside = True
        elif line.strip() and not line.startswith("    "):
            if inside:
                out.append("")
            inside = False
        out.append(line if inside or not line.strip() else _plain(line))
    return [*out, ""]


def _plain(line: str) -> str:
    start = ITEM.match(line)
    head, rest = (line[: start.end()], line[start.end() :]) if start else ("", line)
    parts = CODE.split(rest)
    parts[::2] = [SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    for at in range(1, len(parts), 2):  # a literal must not touch a letter: an escaped space stands between
        before, after = ("\\ " * bool(re.match(r"\w", side)) for side in (parts[at - 1][-1:], parts[at + 1][:1]))
        parts[at] = f"{before}``{parts[at]}``{after}"
    return head + "".join(parts)


def _docstring(*told: object) -> None:
    lines = told[-1]
    assert isinstance(lines, list)
    lines[:] = as_rst(lines)


def setup(app: Sphinx) -> None:
    """Docstrings are plain text, not reStructuredText."""
    app.connect("autodoc-process-docstring", _docstring)

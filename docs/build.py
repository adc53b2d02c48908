"""Build the site: python docs/build.py [--no-run]; the pages are then in docs/_build/html.

Gathers what lies elsewhere in the repository (chapters, figures, changelog) and a page for every module beside the
pages of this folder, and calls Sphinx with warnings as errors. Chapters are run, two at a time, and kept with
their outputs in docs/_build/cache until they change. Nothing is fetched.
"""

import argparse
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
DOCS, BUILD = ROOT / "docs", ROOT / "docs" / "_build"
SOURCE, HTML, CACHE = BUILD / "source", BUILD / "html", BUILD / "cache"
PARTS = {"loopmdm.model": "Models", "loopmdm.analysis": "Analysis"}
BORROWED = {
    "figures/PIPELINE.md": "guides/pipeline.md",
    "figures/README.md": "figures.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "CODE_OF_CONDUCT.md",
}


def gather() -> None:
    """A fresh source folder."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(DOCS, SOURCE, ignore=shutil.ignore_patterns("_build", "build.py", "__pycache__"))
    for source, target in BORROWED.items():
        (SOURCE / target).write_text((ROOT / source).read_text("utf-8"), "utf-8")
    (SOURCE / "chapters").mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, SOURCE / "chapters")
    shutil.copytree(ROOT / "figures" / "gallery", SOURCE / "gallery")


def modules(part: str) -> list[ModuleType]:
    """A part of the package and all below it, by name."""
    top = importlib.import_module(part)
    below = pkgutil.walk_packages(top.__path__, f"{part}.")
    names = [
        name for _, name, _ in below if not any(word.startswith("_") or word == "cli" for word in name.split("."))
    ]
    return [top, *(importlib.import_module(name) for name in sorted(names))]


def own(module: ModuleType) -> list[str]:
    """Public names that are defined in a module itself, in its order."""
    places = {name: place for place, name in enumerate(vars(module))}
    wanted = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    defined = [name for name in wanted if getattr(vars(module).get(name), "__module__", None) == module.__name__]
    return sorted(defined, key=lambda name: places[name])


def first_line(found: object) -> str:
    """What something is, in a line."""
    return re.sub(r"\s+", " ", (inspect.getdoc(found) or "").split("\n\n")[0])


def reference() -> None:
    """A page for every module that has public names, and a page that lists the names at the top."""
    folder = SOURCE / "reference"
    folder.mkdir()
    parts = [
        "# Reference\n",
        "Every public name. Those at the top of `loopmdm` come first. In examples `lm` is `loopmdm`, `m` is",
    ]
    parts += ['`lm.open_model("sudoku-loop-s4")`, `b` two of its test boards with half of their cells hidden.\n']
    parts += ["| `loopmdm.` | what |", "|---|---|"]
    import loopmdm

    for name in sorted(set(dir(loopmdm)) - {"folders", "PARTS", *(part.split(".")[1] for part in PARTS)}):
        found = getattr(loopmdm, name)
        home = getattr(found, "__module__", None)
        if name.startswith("_") or not home or inspect.ismodule(found):
            continue
        parts.append(
            f"| {{py:obj}}`{name} <{home}.{getattr(found, '__qualname__', name)}>` | {first_line(found)} |"
        )
    for part, title in PARTS.items():
        shown = [module for module in modules(part) if own(module)]
        parts += [f"\n## {title}\n", "| module | what |", "|---|---|"]
        parts += [f"| {{doc}}`{module.__name__}` | {first_line(module)} |" for module in shown]
        parts += ["\n```{toctree}", ":hidden:", "", *(module.__name__ for module in shown), "```"]
        for module in shown:
            name = module.__name__
            lines = [
                name,
                "=" * len(name),
                "",
                f".. automodule:: {name}",
                f"   :members: {', '.join(own(module))}",
                "",
            ]
            (folder / f"{name}.rst").write_text("\n".join(lines), "utf-8")
    (folder / "index.md").write_text("\n".join(parts) + "\n", "utf-8")


def commands() -> None:
    """A page with the help of every command."""
    import typer

    from loopmdm.analysis.cli import app

    group = typer.main.get_command(app)
    parts = ["# Command line\n", "`loopmdm COMMAND --help` says the same.\n"]
    for title, names in group.groups().items():  # pyright: ignore[reportAttributeAccessIssue]
        parts += [f"## {title}\n"]
        for name in names:
            command = group.commands[name]  # pyright: ignore[reportAttributeAccessIssue]
            context = command.context_class(command, info_name=f"loopmdm {name}")
            parts += [f"### {name}\n", "```text", command.get_help(context).rstrip(), "```\n"]
    (SOURCE / "commands.md").write_text("\n".join(parts), "utf-8")


def main() -> int:
    """Gather and build; the exit code is Sphinx's."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--no-run", action="store_true", help="chapters without outputs: half a minute")
    run = not asked.parse_args().no_run
    gather()
    reference()
    commands()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "2", "-b", "html"]
    command += ["-D", f"nb_execution_mode={'cache' if run else 'off'}", "-D", f"nb_execution_cache_path={CACHE}"]
    return subprocess.run([*command, SOURCE, HTML], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

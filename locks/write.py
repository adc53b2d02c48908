"""Write the lock files: every package of constraints.txt with the hashes of all its files on PyPI.

    pip install uv==0.13.9 && python locks/write.py TORCH_WHEEL

build.txt is what builds packages that come as source, and this one: it is installed before all others.
base.txt is what the program needs, pipeline.txt and dev.txt what these extras add, docs.txt what the extra docs
adds to dev. torch.txt is torch from PyPI, for Linux, with NVIDIA's packages; torch-cpu.txt is the CPU build whose
wheel is named, which does without them and is taken where pip finds it. Files of all platforms are listed, for
`pip install --require-hashes --no-deps -r`.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TORCH = ("torch", "triton", "nvidia-", "cuda-")
COMMAND = "uv pip compile pyproject.toml locks/build.in --universal --python-version 3.11.5 --generate-hashes"
COMMAND += " --no-header --no-annotate --no-strip-extras -q -c constraints.txt"
BUILD = ("setuptools", "wheel")
EXTRAS = {"base": (), "pipeline": ("pipeline",), "dev": ("notebooks", "dev"), "docs": ("notebooks", "dev", "docs")}
HEADER = "# Written by locks/write.py from constraints.txt; pip install --require-hashes --no-deps -r\n"


def compiled(extras: tuple[str, ...]) -> dict[str, str]:
    """Each pinned package by name: its line, with markers and hashes."""
    words = COMMAND.split() + [word for extra in extras for word in ("--extra", extra)]
    told = subprocess.run(words, cwd=HERE.parent, check=True, capture_output=True, text=True).stdout
    blocks: dict[str, str] = {}
    name = ""
    for line in told.splitlines():
        name = name if line.startswith(" ") else line.partition("==")[0].partition("[")[0]
        blocks[name] = blocks.get(name, "") + line + "\n"
    return blocks


def of_wheel(wheel: Path) -> str:
    """The line of a wheel that lies on this machine."""
    name, version, *_ = wheel.name.split("-")
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def main(wheel: str) -> None:
    """Write the seven files."""
    found = {name: compiled(extras) for name, extras in EXTRAS.items()}
    base = found["base"]
    parts = {"build": {name: base[name] for name in BUILD}}
    parts["torch"] = {name: block for name, block in base.items() if name.startswith(TORCH)}
    parts["torch-cpu"] = {"torch": of_wheel(Path(wheel))}
    parts["base"] = {name: block for name, block in base.items() if name not in (*parts["torch"], *BUILD)}
    for extra, below in {"pipeline": "base", "dev": "base", "docs": "dev"}.items():
        there = found[below]
        parts[extra] = {name: block for name, block in found[extra].items() if there.get(name) != block}
    for name, blocks in parts.items():
        (HERE / f"{name}.txt").write_text(HEADER + "".join(blocks.values()), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Where the packages lie: `loopmdm.model` in loopmdm_model/, `loopmdm.analysis` in analysis/.

An editable install also finds the folders under their own names (loopmdm/folders.py); a wheel does not have these.
It has the study (claims, roster, specs, tables) as loopmdm/figures, and the hashes of the files of every run.
"""

import hashlib
import json
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = {"loopmdm.model": "loopmdm_model", "loopmdm.analysis": "analysis"}
STUDY = ("claims.toml", "zoo.toml", "specs/*.toml", "tables/*.parquet")
ZOO = "loopmdm_model/zoo"


class WithFolders(editable_wheel):
    """An editable install of a checkout."""

    def run(self) -> None:
        """Add the folders' own names."""
        self.distribution.packages += FOLDERS.values()
        super().run()


class WithStudy(build_py):
    """What is built holds all that the commands need."""

    def run(self) -> None:
        """Build anew, without what an earlier build left; add what lies in no package."""
        if self.editable_mode:
            super().run()
            return
        home = Path(self.build_lib, "loopmdm")
        shutil.rmtree(home, ignore_errors=True)
        super().run()
        for pattern in STUDY:
            found = sorted(Path("figures").glob(pattern))
            if not found:
                raise FileNotFoundError(f"figures/{pattern} is missing; build from the repository")
            for path in found:
                self.mkpath(str((home / path).parent))
                self.copy_file(str(path), str(home / path))
        text = json.dumps(files_of_runs(Path(ZOO)), indent=1)
        (home / "model" / "zoo" / "manifest.json").write_text(text + "\n", "utf-8")


def files_of_runs(zoo: Path) -> dict[str, dict[str, tuple[str, int]]]:
    """By run and file: sha256 and size."""
    found: dict[str, dict[str, tuple[str, int]]] = {}
    for path in sorted(zoo.glob("*/**/*")):
        run, *below = path.relative_to(zoo).parts
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            data = path.read_bytes()
            found.setdefault(run, {})["/".join(below)] = (hashlib.sha256(data).hexdigest(), len(data))
    return found


packages = ["loopmdm"]
for new, folder in FOLDERS.items():
    packages += [new, *(f"{new}.{name}" for name in find_packages(folder))]
setup(
    packages=packages,
    package_dir=FOLDERS,
    cmdclass={"build_py": WithStudy, "editable_wheel": WithFolders},
)

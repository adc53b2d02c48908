"""Where the packages lie: `loopmdm.model` in loopmdm_model/, `loopmdm.analysis` in analysis/.

An editable install also finds the folders under their own names (loopmdm/folders.py); a wheel does not have these.
"""

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = {"loopmdm.model": "loopmdm_model", "loopmdm.analysis": "analysis"}


class WithFolders(editable_wheel):
    """An editable install of a checkout."""

    def run(self) -> None:
        """Add the folders' own names."""
        self.distribution.packages += FOLDERS.values()
        super().run()


packages = ["loopmdm"]
for new, folder in FOLDERS.items():
    packages += [new, *(f"{new}.{name}" for name in find_packages(folder))]
setup(
    packages=packages,
    package_dir=FOLDERS,
    cmdclass={"editable_wheel": WithFolders},
)

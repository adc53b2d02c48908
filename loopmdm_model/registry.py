"""Named things of one kind, ours and those of other packages.

Ours are given as a list, or lie in the files of a package, each of which says what it adds in a tuple of one name,
such as MEASURES. A new one is a new file.
Other packages join by an entry point whose group is the registry's, such as "loopmdm.measures"; it names an object
of the kind, or several in a list. They are looked for when the registry is first read, not when it is imported.
"""

import warnings
from collections.abc import Iterable, Iterator, MutableMapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import walk_packages
from typing import Generic, Protocol, TypeVar, runtime_checkable

from loopmdm.model.errors import UsageError, unknown_name


@runtime_checkable
class Named(Protocol):
    """What can be registered."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...


Item = TypeVar("Item", bound=Named)


class Registry(MutableMapping[str, Item], Generic[Item]):
    """Items of a `kind` by name; one name is given once. Assigning to a name replaces what it held.

    `files`: a package, and the name of the tuple that holds the items of each file below it.
    """

    def __init__(
        self, kind: str, type_: type, group: str, items: Iterable[Item] = (), files: tuple[str, str] = ("", "")
    ):
        self.kind, self.type, self.group, self.files = kind, type_, group, files
        self._items: dict[str, Item] = {}
        self._joined = False
        for item in items:
            self.add(item)

    def add(self, item: Item, by: str = "") -> Item:
        """Take in an item; UsageError if its name is taken or it is of another kind. `by` says whose it is."""
        of = f" (of {by})" if by else ""
        if not isinstance(item, self.type):
            raise UsageError(f"a {self.kind} must be a {self.type.__name__}, got {type(item).__name__}{of}")
        if item.name in self._items:
            raise UsageError(f"the {self.kind} {item.name!r}{of} is registered already; give it another name")
        self._items[item.name] = item
        return item

    def _known(self) -> dict[str, Item]:
        if not self._joined:
            self._joined = True  # first: what joins may read the registry
            self._gather()
            for point in sorted(entry_points(group=self.group)):
                self._join(point)
        return self._items

    def _gather(self) -> None:
        package, name = self.files
        for module in walk_packages(import_module(package).__path__, f"{package}.") if package else ():
            found = getattr(import_module(module.name), name, ())
            for item in found if isinstance(found, tuple) else ():
                self.add(item)

    def _join(self, point: EntryPoint) -> None:
        whose = point.dist.name if point.dist else point.value
        try:
            found = point.load()
            for item in found if isinstance(found, list | tuple) else [found]:
                self.add(item, whose)
        except Exception as error:  # somebody else's code: it may raise anything
            text = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{point.name} of {whose} is left out of the {self.kind}s: {text}", stacklevel=5)

    def __getitem__(self, name: str) -> Item:
        """The item of that name; UnknownNameError with near matches."""
        if not isinstance(name, str) or name not in self._known():
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def __setitem__(self, name: str, item: Item) -> None:
        """Put an item in place of another, or as a new one; UsageError if it is of another kind or name."""
        if not isinstance(item, self.type) or item.name != name:
            raise UsageError(f"{name!r} takes a {self.type.__name__} of that name, got {item!r:.60}")
        self._known()[name] = item

    def __delitem__(self, name: str) -> None:
        """Take an item out."""
        del self._known()[name]

    def __iter__(self) -> Iterator[str]:
        """Names, ours first."""
        return iter(self._known())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._known())

    def __repr__(self) -> str:
        """Kind and names."""
        return f"Registry of {len(self)} {self.kind}s: {', '.join(self)}"

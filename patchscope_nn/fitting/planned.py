"""A mapping that is fitted or trained before a run: found in the user's cache, or made now and kept there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from patchscope_nn.fitting.reporting import Notice, Progress
from patchscope_nn.mappings import Fitted, Pair, ResolvedMapping, resolve_mapping
from patchscope_nn.models import Model, builtin, weights_digest


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A mapping that a run needs, and that may not be made yet.

    Attributes:
        name: Its name in tables and manifests, for example `fit:affine`.
        doing: What the progress display calls the work.
        unit: What the progress counts.
        about: Its description before it is made.
        source: M.
        target: M*; the same object if there is one model.
        sites: The name of the site that is read on each side.
        shapes: For each pair of the run, the shapes of its tensors by name.
        make: Makes it; arguments as in `ready`.
        key: A hex digest of everything that decides the maps.
        decided_by: The same, without the pairs if each of them is fitted by itself.
        file: The file it is kept in.
    """

    name: str
    doing: str
    unit: str
    about: dict[str, Any]
    source: Model
    target: Model
    sites: tuple[str, str]
    shapes: Mapping[Pair, Mapping[str, tuple[int, ...]]]
    make: Callable[..., Fitted]
    key: str
    decided_by: str
    file: Path

    @property
    def done(self) -> bool:
        """True if it has been made before."""
        return self.file.is_file()

    def mapping(self) -> ResolvedMapping:
        """The mapping; before it is made, one whose tensors have shapes and no values.

        Its digest is `key`, so that a run has the same hash before and after the mapping is made.
        """
        if not self.done:
            empty = {
                pair: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
                for pair, shapes in self.shapes.items()
            }
            about = self.about | {"file": str(self.file)}
            return ResolvedMapping(
                name=self.name,
                kind="pairs",
                maps=empty,
                digest=self.key,
                about=about,
                decided_by=self.decided_by,
            )
        resolved = resolve_mapping(
            ("fitted", str(self.file)),
            source=self.source.info,
            target=self.target.info,
            pairs=tuple(self.shapes),
            sites=self.sites,
        )
        return replace(resolved, name=self.name, digest=self.key, decided_by=self.decided_by)

    def ready(
        self, *, command: str | None = None, progress: Progress | None = None, notice: Notice | None = None
    ) -> ResolvedMapping:
        """The mapping, made now unless it was made before.

        Args:
            command: The command line, for the provenance.
            progress: Called with (done, total), in units of `unit`.
            notice: Called with a sentence if the fit may be unreliable.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            if not self.done:
                self.make(command=command, progress=progress, notice=notice).save(self.file)
        return self.mapping()


def folder() -> Path:
    """The folder in which fitted and trained mappings are kept."""
    return builtin.cache_folder() / "fits"


def same_model(source: Model, target: Model) -> bool:
    """True if two models are one object, or have the same name and the same weights."""
    return source is target or identity(source) == identity(target)


def identity(model: Model) -> list[Any]:
    """What identifies a model: name, revision, dtype, and a digest of a sample of its local weights."""
    info = model.info
    return [info.name, info.revision, info.dtype, weights_digest(model)]

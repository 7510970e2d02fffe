"""A mapping that is fitted or trained before a run: found in the user's cache, or made now and kept there."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from patchscope_nn.mappings import Fitted, Pair, Parts, ResolvedMapping, resolve_mapping
from patchscope_nn.models import ELSEWHERE, Model, builtin

#: How many numbers of each tensor are compared to tell two models' weights apart.
_SAMPLED = 64


@dataclass(frozen=True, kw_only=True)
class Planned(ABC):
    """A mapping that a run needs, and that may not be made yet.

    Attributes:
        source: M.
        target: M*; the same object if there is one model.
        sites: The name of the site that is read on each side.
        pairs: The pairs of the run.
        key: A hex digest of everything that decides the maps.
        file: The file it is kept in.
    """

    source: Model
    target: Model
    sites: tuple[str, str]
    pairs: tuple[Pair, ...]
    key: str
    file: Path

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in tables and manifests."""

    @property
    @abstractmethod
    def doing(self) -> str:
        """What the progress display calls the work."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """What the progress counts."""

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Its description before it is made."""

    @abstractmethod
    def shapes(self, pair: Pair) -> dict[str, tuple[int, ...]]:
        """The shapes of a pair's tensors, by name."""

    @abstractmethod
    def make(
        self,
        *,
        command: str | None,
        progress: Callable[[int, int], None] | None,
        notice: Callable[[str], None] | None,
    ) -> Fitted:
        """Fit or train it.

        Args:
            command: The command line, for the provenance.
            progress: Called with (done, total), in units of `unit`.
            notice: Called with a sentence if the fit may be unreliable.
        """

    @property
    def done(self) -> bool:
        """True if it has been made before."""
        return self.file.is_file()

    def mapping(self) -> ResolvedMapping:
        """The mapping; before it is made, one whose tensors have shapes and no values.

        Its digest is `key`, so that a run has the same hash before and after the mapping is made.
        """
        if not self.done:
            return ResolvedMapping(
                name=self.name,
                kind="pairs",
                maps=self._empty(),
                digest=self.key,
                about=self.about | {"file": str(self.file)},
            )
        resolved = resolve_mapping(
            ("fitted", str(self.file)),
            source=self.source.info,
            target=self.target.info,
            pairs=self.pairs,
            sites=self.sites,
        )
        return replace(resolved, name=self.name, digest=self.key)

    def ready(
        self,
        *,
        command: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> ResolvedMapping:
        """The mapping, made now unless it was made before; arguments as in `make`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            if not self.done:
                self.make(command=command, progress=progress, notice=notice).save(self.file)
        return self.mapping()

    def _empty(self) -> Mapping[Pair, Parts]:
        return {
            pair: {name: torch.empty(shape, device="meta") for name, shape in self.shapes(pair).items()}
            for pair in self.pairs
        }


def folder() -> Path:
    """The folder in which fitted and trained mappings are kept."""
    return builtin.cache_folder() / "fits"


def same_model(source: Model, target: Model) -> bool:
    """True if two models are one object, or have the same name and the same weights."""
    return source is target or identity(source) == identity(target)


def identity(model: Model) -> list[Any]:
    """What identifies a model: name, revision, dtype, and a digest of a sample of its local weights."""
    info = model.info
    digest = hashlib.sha256()
    if info.device != ELSEWHERE:
        for name, tensor in model.module.state_dict().items():
            step = max(1, tensor.numel() // _SAMPLED)
            sample = tensor.detach().flatten()[::step].float().cpu()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return [info.name, info.revision, info.dtype, digest.hexdigest()[:16]]

"""What is fitted or trained before a run: found in the user's cache, or made now and put there."""

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

#: How many numbers of each tensor tell a model's weights apart from another's.
_SAMPLED = 64


@dataclass(frozen=True, kw_only=True)
class Planned(ABC):
    """A mapping that a run needs, and that may still be to be made.

    Attributes:
        source: M.
        target: M*; the same object where there is one model.
        sites: The name of the site that is read on each side.
        pairs: The pairs of the run.
        key: Hex digest of everything that decides the maps.
        file: Where it is kept.
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
        """How tables and manifests call it."""

    @property
    @abstractmethod
    def doing(self) -> str:
        """What its progress says is being done."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """What its progress counts."""

    @property
    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What is known of it before it is made."""

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
        """Make it."""

    @property
    def done(self) -> bool:
        """Whether it has been made before."""
        return self.file.is_file()

    def mapping(self) -> ResolvedMapping:
        """The mapping; before it is made one whose tensors have shapes and no numbers.

        Its digest is that of what decides the maps, so that a run is the same before and after.
        """
        if not self.done:
            return ResolvedMapping(
                name=self.name,
                kind="pairs",
                maps=self._empty(),
                digest=self.key,
                about=self.about | {"file": str(self.file)},
            )
        found = resolve_mapping(
            ("fitted", str(self.file)),
            source=self.source.info,
            target=self.target.info,
            pairs=self.pairs,
            sites=self.sites,
        )
        return replace(found, name=self.name, digest=self.key)

    def ready(
        self,
        *,
        command: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> ResolvedMapping:
        """The mapping, made now unless it has been made before.

        Args:
            command: The command, for the provenance.
            progress: Called with (done, in all), of what `unit` says.
            notice: Called with what a researcher should know.
        """
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
    """Where what is made before a run is kept."""
    return builtin.cache_folder() / "fits"


def same_model(source: Model, target: Model) -> bool:
    """Whether two models are one: one object, or the same weights under one name."""
    return source is target or identity(source) == identity(target)


def identity(model: Model) -> list[Any]:
    """What tells a model from another: name, revision, dtype, and a sample of the weights that are here."""
    info = model.info
    digest = hashlib.sha256()
    if info.device != ELSEWHERE:
        for name, tensor in model.module.state_dict().items():
            step = max(1, tensor.numel() // _SAMPLED)
            sample = tensor.detach().flatten()[::step].float().cpu()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return [info.name, info.revision, info.dtype, digest.hexdigest()[:16]]

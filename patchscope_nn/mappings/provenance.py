"""Where a fitted mapping comes from: models, data, settings, and its scores on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from patchscope_nn._util.arguments import checked_class
from patchscope_nn._util.clocks import utc_now
from patchscope_nn._util.versions import recorded_versions
from patchscope_nn.body.mappings import Pair
from patchscope_nn.models import ModelInfo
from patchscope_nn.spec import RESIDUAL


@checked_class
@dataclass(frozen=True, kw_only=True)
class Space:
    """The hidden space on one side of a mapping.

    Attributes:
        name: The model's id, folder or `builtin:` name.
        revision: The commit of a Hub model, if known.
        dtype: The dtype its states were read in.
        d_model: The size of a state.
        site: The name of the site; the input of blocks is the residual stream, as their output is.
    """

    name: str
    d_model: int
    revision: str | None = None
    dtype: str = "float32"
    site: str = RESIDUAL.name

    @classmethod
    def of(cls, info: ModelInfo, *, site: str = RESIDUAL.name) -> Space:
        """The space of a loaded model."""
        # Not a global: this class travels inside a user's mapping, and would take the registry with it.
        from patchscope_nn.spec import site_named

        width = info.width(site_named(site))
        return cls(name=info.name, revision=info.revision, dtype=info.dtype, d_model=width, site=site)

    def __str__(self) -> str:
        revision = f" at {self.revision}" if self.revision else ""
        return f"{self.name}{revision} (d_model {self.d_model})"


@checked_class
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What must be known of a fitted mapping to trust it later.

    Attributes:
        source_model: The space it maps from.
        target_model: The space it maps to.
        data: The data of the fit and of the scores: descriptions, fingerprints, and counts of texts and
            positions.
        settings: The other settings of the fit: lambda, rank, steps, ...
        held_out: For each pair its scores on held-out data: `fraction_of_variance`, `cosine`, `n`
            (positions), ...; empty if there are none.
        seed: The seed for the choice of positions and texts.
        command: The command line that made it.
        created: When it was made, ISO 8601.
        versions: The versions of the packages that made it.
    """

    source_model: Space
    target_model: Space
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[Pair, Mapping[str, float]] = field(default_factory=dict)
    seed: int | None = None
    command: str | None = None
    created: str = field(default_factory=utc_now)
    versions: Mapping[str, str] = field(default_factory=recorded_versions)

    def dump(self) -> dict[str, Any]:
        """A form that JSON can hold; `parse` reads it back."""
        held_out = [[*pair, dict(numbers)] for pair, numbers in sorted(self.held_out.items())]
        return {**asdict(self), "held_out": held_out}

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Provenance:
        """Read what `dump` returned.

        Raises:
            KeyError, TypeError, ValueError: It is not what `dump` returns.
        """
        return cls(
            **{
                **plain,
                "source_model": Space(**plain["source_model"]),
                "target_model": Space(**plain["target_model"]),
                "held_out": {(source, target): scores for source, target, scores in plain["held_out"]},
            }
        )

"""What a fit gives: maps or a prompt, scores on held-out data, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from patchscope_nn.errors import MappingError
from patchscope_nn.mappings import Pair, Parts, Provenance
from patchscope_nn.mappings.fitted import METADATA


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """A fitted mapping, before its models and data are added.

    Attributes:
        kind: The kind, for example `tuned_lens`.
        maps: For each (l, l*), `weight` (d_out, d_in) or `scale` (1,), and optionally `bias` (d_out,).
        held_out: One score for each (l, l*), on data that was not fitted on.
        provenance: The settings and the counts of the data, as JSON holds them.
    """

    kind: str
    maps: Mapping[Pair, Parts] = field(repr=False)
    held_out: tuple[Any, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedPrompt:
    """A soft prompt.

    Attributes:
        soft_prompt: (k, d_model), the states that replace T's first k tokens at the input of block 0.
        held_out: A `FutureScore` for each offset.
        about: Where it comes from; it holds the scores under the pair (l, l), by offset.
    """

    soft_prompt: torch.Tensor
    held_out: tuple[Any, ...]
    about: Provenance

    def said(self) -> dict[str, Any]:
        """The metadata of its file."""
        return {"kind": "soft_prompt", **self.about.dump()}

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file: the tensor `soft_prompt`, and in its metadata where it comes from.

        Raises:
            MappingError: It cannot be written.
        """
        file = Path(file)
        tensors = {"soft_prompt": self.soft_prompt.contiguous().cpu()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata={METADATA: json.dumps(self.said())})
        except OSError as error:
            raise MappingError(f"{file} cannot be written: {error}.", hint="Name another file.") from error
        return file

"""What the cells of a run folder have in common: cells of runs that differ in it are never mixed.

Everything else may grow: data rows, layers, positions, scales, samples and controls only add cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from patchscope_nn.errors import FolderError
from patchscope_nn.models import TRANSFORMERS, Model, quantisation, weights_digest
from patchscope_nn.runs.prepared import PreparedRun

#: Raise it with every change of this package after which the same cell has another result, beyond rounding,
#: or its part other columns. Runs of different versions are then kept apart.
RESULTS = 1
#: The fields of a recipe that only add cells, or that affect only what is computed from them.
_SELECTS = {
    "source": ("model", "position", "layer"),
    "target": ("model", "position", "layer", "scale", "combine"),
    "recipe": (
        *("name", "title", "paper", "model", "data", "controls", "best_over", "probe", "score"),
        *("source", "target"),
    ),
}
#: The fields with the weights of each pair of layers; a run with fewer layers has fewer.
_BY_LAYER = "weights of mapping "
_SHOWN = 60

Identity = dict[str, Any]


def identity(prepared: PreparedRun) -> Identity:
    """Return what the run's cells have in common, as plain values by name."""
    recipe = prepared.recipe
    common: Identity = {"result version": RESULTS}
    common |= _model("source", prepared.source) | _model("target", prepared.target)
    for side in ("source", "target"):
        fields = {name: value for name, value in recipe[side].items() if name not in _SELECTS[side]}
        if fields.get("corrupt"):
            fields["corrupt"] = {**fields["corrupt"], "samples": None}
        common |= {f"{side}.{name}": value for name, value in fields.items()}
    common |= {name: value for name, value in recipe.items() if name not in _SELECTS["recipe"]}
    common["weights of vectors"] = prepared.vectors
    common |= {f"{_BY_LAYER}{pair}": digest for pair, digest in prepared.mapping.digests().items()}
    common |= {f"code of {name}": digest for name, digest in prepared.own_functions.items()}
    plain: Identity = json.loads(json.dumps(common, default=str))
    return plain


def _model(side: str, model: Model) -> Identity:
    info = model.info
    other = {} if info.engine == TRANSFORMERS else {f"{side} engine": info.engine}
    return {
        **other,
        f"{side} model": info.name,
        f"{side} revision": info.revision,
        f"{side} dtype": info.dtype,
        f"{side} quantisation": quantisation(model),
        f"{side} weights": weights_digest(model),
    }


def check_same(folder: Path, manifest: Mapping[str, Any], other: Mapping[str, Any], *, hint: str) -> None:
    """Check that the cells of a folder may stand beside other cells.

    Args:
        folder: The folder.
        manifest: Its manifest.
        other: The identity of the other cells.
        hint: What to do if they may not.

    Raises:
        FolderError: They may not; the message has the first field in which they differ, and both values.
    """
    own = manifest.get("identity")
    if own is None:
        raise FolderError(
            f"{folder} was written by an earlier version of patchscope-nn, whose manifest does not say what "
            "its cells depend on.",
            hint=f"{hint} `patchscope report` still reads it.",
        )
    for name in dict.fromkeys([*other, *own]):
        first, second = own.get(name), other.get(name)
        # A model on a server has no digest of its weights.
        may_be_unknown = name.startswith(_BY_LAYER) or name.endswith(" weights")
        unknown = may_be_unknown and None in (first, second)
        if first != second and not unknown:
            first, second = _both_shown(first, second)
            raise FolderError(
                f"{folder} holds cells of another run: its {name} is {first}, and this run's is {second}.",
                hint=hint,
            )


def joined(first: Identity, second: Identity) -> Identity:
    """Return the identity of two runs that may be mixed: of each field, the value that is known."""
    return {**first, **{name: value for name, value in second.items() if value is not None}}


def _both_shown(first: Any, second: Any) -> tuple[str, str]:
    """Return two different values for a message: of long ones, what follows the first difference."""
    texts = repr(first), repr(second)
    if max(map(len, texts)) <= _SHOWN:
        return texts
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    start = max(0, alike - _SHOWN // 3)
    cut = [f"{'...' if start else ''}{text[start : start + _SHOWN]}" for text in texts]
    ends = ["..." if len(text) > start + _SHOWN else "" for text in texts]
    return cut[0] + ends[0], cut[1] + ends[1]

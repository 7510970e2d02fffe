"""Lenses published by others, read from their own file formats.

A tuned lens (Belrose et al. 2023, arXiv 2303.08112) is a folder as the package `tuned-lens` 0.2.0 writes it
(`TunedLens.save` in `tuned_lens/nn/lenses.py`): `config.json`, and `params.pt`, the state dict of one linear
translator for each block. Translator i reads `hidden_states[i]` (`tuned_lens/scripts/train_loop.py`): the
*input* of block i, and so layer i - 1 here; the lens is unembed(h + A h + b) (`transform_hidden`).

A Jacobian lens (Gurnee et al. 2026) is a file as `JacobianLens.save` writes it (`jlens/lens.py` of
github.com/anthropics/jacobian-lens; huggingface.co/neuronpedia/jacobian-lens publishes such files, and
TransformerLens reads and writes them): a dict of `J`, which maps a block's index to (d_model, d_model), and
`n_prompts`, `source_layers`, `d_model`. Block l's output is layer l here; the lens is unembed(J h).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchscope_nn.errors import MappingError
from patchscope_nn.mappings.fitted import Fitted
from patchscope_nn.mappings.provenance import Provenance, Space
from patchscope_nn.models import ModelInfo

#: The mappings that read a published lens: `{tuned_lens: FOLDER}`, `{jacobian_lens: FILE}`.
PUBLISHED = ("tuned_lens", "jacobian_lens")

_TRANSLATOR = re.compile(r"(\d+)\.(weight|bias)")


def load_published(kind: str, place: str | Path, *, info: ModelInfo) -> Fitted:
    """Read a published lens for a model.

    For the last block both lenses are the identity and have no matrix.

    Args:
        kind: One of `PUBLISHED`.
        place: The folder or file.
        info: The model whose states it maps. A Jacobian lens does not name its own.

    Returns:
        A map from each of its layers to the model's last block.

    Raises:
        MappingError: It cannot be read, is not such a lens, or is a lens of another model.
    """
    if kind == "jacobian_lens":
        name, revision, maps = info.name, info.revision, read_jacobian_lens(place)
    else:
        maps = read_tuned_lens(place)
        config = json.loads((Path(place).expanduser() / "config.json").read_text("utf-8"))
        name, revision = str(config.get("base_model_name_or_path")), config.get("base_model_revision")
    last = info.n_layers - 1
    size = next(iter(maps.values()))["weight"].shape[0]
    if size != info.d_model or max(maps) > last:
        raise MappingError(
            f"mapping.{kind}={str(place)!r} is for states of {size} numbers and layers up to {max(maps)}; "
            f"{info.name} has {info.d_model} and layers up to {last}.",
            hint="Give the lens of this model.",
        )
    whole = {last: {"weight": torch.eye(size)}} | maps
    space = Space(name=name, revision=revision, d_model=size, dtype="float32")
    return Fitted(
        kind=kind,
        maps={(layer, last): tensors for layer, tensors in whole.items()},
        about=Provenance(source_model=space, target_model=space, data={"published": str(place)}),
    )


def read_tuned_lens(folder: str | Path) -> dict[int, dict[str, torch.Tensor]]:
    """Read a published tuned lens from a folder with `config.json` and `params.pt`.

    Returns:
        For each layer (-1 is the embedding), the map to the last block: `weight` = I + A (d_model, d_model)
        and, where the lens has one, `bias` (d_model,).

    Raises:
        MappingError: The files cannot be read, or do not hold such a lens.
    """
    field = f"mapping.tuned_lens={str(folder)!r}"
    place = Path(folder).expanduser()
    try:
        config = json.loads((place / "config.json").read_text("utf-8"))
        size, count = int(config["d_model"]), int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MappingError(
            f"{field} has no config.json with d_model and num_hidden_layers: {error}.",
            hint="Give a folder with the config.json and params.pt of the package tuned-lens.",
        ) from error
    state = _load(place / "params.pt", field=field)
    maps: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = _TRANSLATOR.fullmatch(str(key))
        expected = (size, size) if match and match[2] == "weight" else (size,)
        if match is None or int(match[1]) >= count or _shape(tensor) != expected:
            raise MappingError(
                f"{field}: params.pt holds {key!r} of shape {_shape(tensor)}; it should hold '0.weight' "
                f"({size}, {size}), '0.bias' ({size},) and so on, of {count} translators.",
                hint="Give a lens of the package tuned-lens.",
            )
        maps.setdefault(int(match[1]) - 1, {})[match[2]] = tensor.float()
    missing = [index for index in range(count) if "weight" not in maps.get(index - 1, {})]
    if missing:
        raise MappingError(f"{field}: params.pt lacks the translator {missing[0]} of {count}.")
    eye = torch.eye(size)
    return {layer: tensors | {"weight": eye + tensors["weight"]} for layer, tensors in sorted(maps.items())}


def read_jacobian_lens(file: str | Path) -> dict[int, dict[str, torch.Tensor]]:
    """Read a published Jacobian lens from a .pt file.

    Returns:
        For each layer it was fitted for, the map to the last block: `weight` = J (d_model, d_model).

    Raises:
        MappingError: The file cannot be read, or does not hold such a lens.
    """
    field = f"mapping.jacobian_lens={str(file)!r}"
    state = _load(Path(file).expanduser(), field=field)
    jacobians, size = state.get("J"), state.get("d_model")
    if (
        not isinstance(jacobians, Mapping)
        or not jacobians
        or not all(isinstance(layer, int) and _shape(j) == (size, size) for layer, j in jacobians.items())
    ):
        raise MappingError(
            f"{field} holds {sorted(map(str, state))}; it should hold 'J', a dict of block numbers and "
            "(d_model, d_model) tensors, and 'd_model'.",
            hint="Give a lens as jlens saves it (not a checkpoint of its fitting).",
        )
    return {layer: {"weight": jacobians[layer].float()} for layer in sorted(jacobians)}


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _load(file: Path, *, field: str) -> Mapping[Any, Any]:
    """Read a dict from a .pt file, unpickling only tensors and plain values."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise MappingError(f"{field} cannot be read: {reason}.", hint=f"Check {file.name}.") from error
    if not isinstance(state, Mapping):
        raise MappingError(f"{field} holds a {type(state).__name__}, not a dict.", hint=f"Check {file.name}.")
    return state

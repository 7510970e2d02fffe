"""Loads vectors from files: states that come from no prompt, and learned target embeddings."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from patchscope_nn.errors import MappingError
from patchscope_nn.spec import SITES
from patchscope_nn.sweep.entry import VectorAt

if TYPE_CHECKING:
    import torch

    from patchscope_nn.sweep.expand import Sweep

_BUILTIN = Path(__file__).parents[1] / "data" / "builtin"


def load_vector(at: VectorAt) -> torch.Tensor:
    """Load one vector, (1, d_model).

    Raises:
        MappingError: The file cannot be read, or does not have that tensor or row.
    """
    tensor = _tensor(at.file, at.key, "source.vector")
    if tensor.ndim == 1 and at.row is None:
        return tensor[None]
    if tensor.ndim != 2 or at.row is None:  # noqa: PLR2004 (a matrix)
        raise MappingError(
            f"source.vector: {at.file} holds a tensor of shape {tuple(tensor.shape)}.",
            hint="Name a row of a (n, d_model) matrix by index, or give a file with a (d_model,) vector.",
        )
    count = len(tensor)
    if not -count <= at.row < count:
        raise MappingError(
            f"source.vector: row {at.row} is outside {at.file}, which has {count} rows.",
            hint="Rows are counted from 0; -1 is the last.",
        )
    return tensor[at.row][None].clone()


def load_soft_prompt(file: str) -> torch.Tensor:
    """Load learned embeddings, (k, d_model).

    Raises:
        MappingError: The file cannot be read, or does not hold learned embeddings.
    """
    tensor = _tensor(file, "soft_prompt", "target.soft_prompt")
    if tensor.ndim != 2:  # noqa: PLR2004 (a matrix)
        raise MappingError(
            f"target.soft_prompt: {file} holds a tensor of shape {tuple(tensor.shape)}.",
            hint="Save soft_prompt as (k, d_model), an embedding for each token.",
        )
    return tensor


def check_vectors(sweep: Sweep) -> str:
    """Check that a sweep's vectors fit its models, and return a hex digest of the files' contents.

    Raises:
        MappingError: A vector does not fit, or cannot be read.
    """
    files = dict.fromkeys(at.file for at in sweep.vectors)
    width = sweep.source.width(SITES[sweep.scope.source.site])
    for at in sweep.vectors:
        _check_width(load_vector(at), width, sweep.source.name, str(at))
    soft = sweep.scope.target.soft_prompt
    if soft:
        files[soft] = None
        tensor = load_soft_prompt(soft)
        _check_width(tensor, sweep.target.d_model, sweep.target.name, soft)
        # A text-only T has no learned embeddings.
        prompts = {entry.target_prompt for entry in sweep.entries if not entry.text_only}
        shortest = min(len(sweep.target_prompts[prompt].ids) for prompt in prompts)
        if len(tensor) > shortest:
            raise MappingError(
                f"target.soft_prompt: {soft} holds {len(tensor)} embeddings, and target.prompt has "
                f"{shortest} tokens.",
                hint="Give a target prompt with a token for each of them.",
            )
    contents = [hashlib.sha256(_path(file).read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:16] if contents else ""


def _check_width(tensor: torch.Tensor, width: int, model: str, name: str) -> None:
    if tensor.shape[-1] != width:
        raise MappingError(
            f"{name} is {tensor.shape[-1]} wide; the states of {model} are {width} wide.",
            hint="Use a vector that was made for this model.",
        )


def _path(file: str) -> Path:
    """Return the path of a file; `builtin:NAME` is a file that ships with the package."""
    kind, _, name = file.partition(":")
    return _BUILTIN / f"{name}.safetensors" if kind == "builtin" else Path(file)


def _tensor(file: str, key: str | None, field: str) -> torch.Tensor:
    from safetensors import SafetensorError

    try:
        path = _path(file)
        return _read(str(path), key, path.stat().st_mtime_ns)
    except OSError as error:
        raise MappingError(
            f"{field}: {file} cannot be read: {error.strerror or error}.",
            hint="Check the path, which starts from the folder you are in.",
        ) from error
    except SafetensorError as error:
        raise MappingError(
            f"{field}: {file} is not a safetensors file: {error}.",
            hint="Write one with safetensors.torch.save_file.",
        ) from error
    except KeyError as error:
        named = field == "source.vector"
        raise MappingError(
            f"{field}: {file} {error.args[0]}",
            hint="Name one of them by key." if named else f"Save the embeddings as {key}.",
        ) from error


@functools.lru_cache(maxsize=8)
def _read(file: str, key: str | None, changed: int) -> torch.Tensor:  # noqa: ARG001 (a changed file is read again)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            raise KeyError(f"holds {', '.join(names)}, and not {key or 'one tensor'}.")
        return opened.get_tensor(key).float()

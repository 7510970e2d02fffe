"""Where verdicts are kept: a file for each structure of a model, in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import suppress
from pathlib import Path

from patchscope_nn._util.digests import digest
from patchscope_nn._util.files import write_whole
from patchscope_nn._util.versions import DECIDING, versions_of
from patchscope_nn.models import Model, Verdict, builtin

#: What of a config names a checkpoint and decides nothing.
_NAMES = ("_name_or_path", "transformers_version", "id2label", "label2id", "architectures")


def folder() -> Path:
    """The folder of the verdicts."""
    return builtin.cache_folder() / "proofs"


def structure_key(model: Model, *, host: str = "") -> str:
    """Hex digest of everything that decides what is proven of a model, but its weights.

    Args:
        model: The model.
        host: The server that has its weights; empty where they are in this process.

    Returns:
        A digest of its class, config, attention implementation, dtype and device, of the versions of torch,
        transformers and nnsight, and of this package's code.
    """
    module = model.module
    config = {name: value for name, value in module.config.to_dict().items() if name not in _NAMES}
    decides = [
        type(module).__qualname__,
        config,
        str(module.config._attn_implementation),  # noqa: SLF001 (transformers' own name for it)
        model.info.dtype,
        host or model.info.device.partition(":")[0],
        versions_of(DECIDING),
        _code_digest(),
    ]
    return digest(decides, length=24)


@functools.cache
def _code_digest() -> str:
    """Hex digest of this package's source: other code may be wrong on other models."""
    package = Path(__file__).parent.parent
    source = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        source.update(file.read_bytes())
    return source.hexdigest()


def known(key: str) -> Verdict | None:
    """The verdict that is kept under a key; None where there is none that can be read."""
    try:
        return Verdict.parse(json.loads((folder() / f"{key}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(verdict: Verdict) -> None:
    """Keep a verdict; where the folder cannot be written, it is proven again next time."""
    file = folder() / f"{verdict.key}.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(verdict.dump(), indent=1))

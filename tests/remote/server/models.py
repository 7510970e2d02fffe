"""The models the server serves, as folders: the builtin one, and a tiny random Llama of another size."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/, for `tiny`

import launch
import tiny

from patchscope_nn.models import builtin

#: Sizes of their own, so that a mapping between the two models is no square.
D_MODEL, N_LAYERS = 48, 6


def main():
    ready = launch.models()
    if not (ready[launch.TINY] / "config.json").exists():
        tiny.make_module("llama", seed=7, d_model=D_MODEL, n_layers=N_LAYERS).save_pretrained(
            ready[launch.TINY]
        )
        tiny.TOKENIZER.save_pretrained(ready[launch.TINY])
    if not ready[launch.BUILTIN].exists():
        folder = builtin.folder()
        if folder is None:
            sys.exit(f"ndif: the builtin model's weights are absent: {builtin.INSTALL}")
        shutil.copytree(folder, ready[launch.BUILTIN])


if __name__ == "__main__":
    main()

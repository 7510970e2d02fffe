"""Make the builtin directions: how the mean state of sentences on one topic differs from a neutral one's.

    python -m benchmarks.make_directions

In the recipe that explains directions they stand for those of a sparse autoencoder, or for steering vectors.
There is one for each topic of the builtin data, read at one layer of the builtin model by the library itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import patchscope_nn as ps

LAYER = 12
FOLDER = Path(ps.__file__).parent / "data" / "builtin"


def main() -> None:
    """Write `directions.safetensors`, a row for each topic, and `directions.jsonl`, which names them."""
    scope = ps.Patchscope(
        source=ps.Source(
            prompt="{text}", layer=LAYER, mean={"rows": "topic"}, minus="This is a sentence about something."
        ),
        target=ps.Target(prompt="x", layer=LAYER),
        readout=ps.Hidden(),
    )
    run = ps.run(scope, data={"builtin": "topics"})
    rows = [json.loads(line) for line in (FOLDER / "topics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(row["topic"] for row in rows))
    directions = torch.tensor([hidden[0] for hidden in run.table()["hidden"]])
    save_file({"directions": directions}, FOLDER / "directions.safetensors")
    lines = [json.dumps({"index": place, "topic": name}) for place, name in enumerate(names)]
    (FOLDER / "directions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

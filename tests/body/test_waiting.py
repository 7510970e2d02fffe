"""Inside a pass, the host waits for the device only where the end of texts must be known."""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import patchscope_nn as ps
from patchscope_nn import backends

#: Operations whose result, or its shape, the host has to wait for.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "masked_select", "equal")
#: Tensors of the program are not on the device; after a pass, its columns are on the host.
ALLOWED = {"in_write": "the program's", "in_explained": "once a pass"}
STEPS = 5


class Waits(TorchDispatchMode):
    """Counts, for each function of `body`, the operations that the host waits for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        chosen = isinstance(indices, list | tuple) and any(
            str(getattr(i, "dtype", "")) == "torch.bool" for i in indices
        )
        if name in WAITING or chosen:
            places = ("patchscope_nn/body", "/transformers/", "/nnsight/")
            frames = [
                frame
                for frame in traceback.extract_stack()
                if any(place in frame.filename for place in places)
            ]
            if frames and places[0] in frames[-1].filename:
                self.found[frames[-1].name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "readout",
    [
        ps.NextToken(top_k=3, reference="source"),
        ps.Generate(max_new_tokens=STEPS),
        ps.Choices(continuations=[" a", " is"]),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_pass_waits_once_for_each_token_it_decodes(tiny_model, monkeypatch, readout, packed):
    waits, passes, real = Waits(), [], backends.Local.run

    def run(backend, context, program, **options):
        passes.extend(program["targets"])
        with waits:
            return real(backend, context, program, **options)

    monkeypatch.setattr(backends.Local, "run", run)
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}", layer="all"),
        target=ps.Target(prompt="The city -> ", layer="all"),
        readout=readout,
    )
    rows = [{"text": text} for text in ("The Eiffel Tower", "the city of Paris", "Diana is in Paris")]
    off = None if packed else ps.Optimisations(prefix_sharing=False, late_entry=False)
    ps.run(scope, model=tiny_model(), data=rows, controls=["random", "unpatched"], optimisations=off)
    decoded = waits.found.pop("read_decoded", 0)
    assert decoded <= STEPS * len(passes)
    assert waits.found["in_explained"] <= len(passes)
    assert set(waits.found) <= set(ALLOWED)

"""Maps the states of a step before it runs, so that the weights of the mapping need not travel with it."""

from __future__ import annotations

from typing import Any

import torch

from patchscope_nn.body.program import StepProgram, Writing
from patchscope_nn.mappings import apply_mapping


def map_states(program: StepProgram, states: torch.Tensor | None) -> StepProgram:
    """Return a step that is given its states, mapped if its mapping has a function or weights.

    With a mapping of its own for each pair of layers, a state is mapped once for each pair it is written for.

    Args:
        program: The step. Its source passes have run.
        states: All its states, with their sums; None if it has none.
    """
    given: StepProgram = {**program, "given": states}
    writing = program["writing"]
    kind, weights = writing["mapping"], writing["weights"]
    if states is None or kind not in ("call", "pairs"):
        return given
    identity = {**identity_writing(), "mode": writing["mode"], "amount": writing["amount"]}
    given["writing"] = identity  # type: ignore[typeddict-item]
    if kind == "call":
        given["given"] = apply_mapping(kind, weights, states, states.new_zeros(()))
        return given
    writes = [write for target in program["targets"] for write in target["writes"].values()]
    states_of: list[Any] = [write["states"] for write in writes]
    wanted = [
        torch.cat([numbers[:, None], write["pairs"]], dim=1)
        for numbers, write in zip(states_of, writes, strict=True)
    ]
    uses, number = torch.cat(wanted).unique(dim=0, return_inverse=True)
    given["given"] = apply_mapping(kind, weights, states[uses[:, 0]], states.new_zeros(()), uses[:, 1:])
    numbers = iter(number.split([len(part) for part in wanted]))
    targets: list[Any] = [
        {
            **target,
            "writes": {at: {**write, "states": next(numbers)} for at, write in target["writes"].items()},
        }
        for target in program["targets"]
    ]
    given["targets"] = targets
    return given


def identity_writing() -> Writing:
    """Return the writing of a step that leaves states as they are."""
    return {"mapping": "identity", "weights": None, "mode": "replace", "amount": 0.0}

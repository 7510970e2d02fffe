"""Divides a step of two models into the half that reads the source and the half that writes the target.

Between the two halves, states travel as values. A mapping of the user's own is applied before they travel if
that sends fewer bytes; then its weights stay here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchscope_nn._util.ragged import Ints
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.body.states import in_together
from patchscope_nn.lower.mapping import identity_writing, map_states
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.plan import Plan, Step
from patchscope_nn.spec import SITES

#: The bytes of a log-probability; they are float32 whatever the model is.
_LOGPROB = 4


def source_half(program: StepProgram) -> StepProgram:
    """Return the half of a step that reads its states, and returns all of them."""
    sources = program["sources"]
    states = sum(len(places["rows"]) for source in sources for places in source["reads"].values())
    finals = sum(len(source["finals"]["rows"]) for source in sources if source["finals"] is not None)
    return {
        **program,
        "targets": [],
        "given": None,
        "given_finals": None,
        "soft": None,
        "prefix": None,
        "keep": torch.arange(states),
        "keep_finals": torch.arange(finals),
        "sums": None,
        "writing": identity_writing(),
    }


def target_half(program: StepProgram, read: Results) -> StepProgram:
    """Return the half of a step that writes the states that its other half has read.

    The states are mapped here if that sends fewer bytes than sending them with their mapping.

    Args:
        program: The step.
        read: What its source half returned.
    """
    states, finals = (
        in_together([part for part in parts if part is not None and len(part)])
        for parts in ((program["given"], read["kept"]), (program["given_finals"], read["kept_finals"]))
    )
    half: StepProgram = {**program, "sources": [], "given": states, "given_finals": finals}
    mapping = program["writing"]
    # States are summed before they are mapped, so sums cannot be mapped here.
    shared = program["given"] is not None or len(program["keep"]) > 0 or program["sums"] is not None
    if states is None or shared or mapping["mapping"] not in ("call", "pairs"):
        return half
    with torch.no_grad():
        mapped: Any = map_states(half, states)
    if maps_here(mapping["weights"], states=size(states), mapped=size(mapped["given"])):
        return mapped
    return half


def maps_here(call: Any, *, states: int, mapped: int) -> bool:
    """Return whether states are mapped before they travel, because that sends no more bytes.

    Args:
        call: The mapping's function or weights.
        states: The bytes of the states.
        mapped: Their bytes once they are mapped.
    """
    return states > 0 and mapped <= states + weights(call)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is sent to M* in all steps of a plan.

    Attributes:
        steps: Steps that send anything.
        states: Hidden states that are sent, counted by position.
        distributions: Next-token distributions of M that are sent.
        bytes: Bytes of all of it, including the mapping's weights if they are sent.
        mapped_here: Steps whose states are mapped before they are sent.
        mapping: The mapping's name.
        weights: The bytes of the mapping's weights; each step that is not mapped here sends them, or of a
            mapping with weights for each pair of layers those of its own pairs.
    """

    steps: int = 0
    states: int = 0
    distributions: int = 0
    bytes: int = 0
    mapped_here: int = 0
    mapping: str = "identity"
    weights: int = 0


def traffic(planned: Plan, mapping: ResolvedMapping) -> Traffic | None:
    """Predicts what will be sent between two models; None if they share a context."""
    if planned.context != "bridged":
        return None
    steps = [_sent(planned, step, mapping) for step in planned.steps()]
    return Traffic(
        steps=sum(step.steps for step in steps),
        states=sum(step.states for step in steps),
        distributions=sum(step.distributions for step in steps),
        bytes=sum(step.bytes for step in steps),
        mapped_here=sum(step.mapped_here for step in steps),
        mapping=mapping.name,
        weights=weights(mapping.maps or mapping.call),
    )


def _sent(planned: Plan, step: Step, mapping: ResolvedMapping) -> Traffic:
    """Predict `target_half`: what a step sends."""
    sweep, number = planned.sweep, planned.sweep.source.bytes_per_number
    read = number * sweep.source.width(SITES[sweep.scope.source.site])
    written = number * sweep.target.width(SITES[sweep.scope.target.site])
    final = sweep.states.is_final(step.states)
    states = results = _positions(planned, step.states[~final])
    sent = mapping.call
    if mapping.kind == "pairs":
        writes, origins = sweep.writes(step.cells), sweep.cells.read_origins
        origin = origins.values[origins.starts[step.cells.read[writes.cell]]]
        needed = sweep.states.hidden(origin, writes.layer)
        uses = np.unique(np.stack([needed, writes.layer, writes.mapped], axis=1), axis=0)
        results = _positions(planned, uses[:, 0])
        sent = mapping.within((layer, target) for _, layer, target in uses.tolist())
    shared = bool(len(step.carried) or len(step.kept)) or _is_made(planned)
    here = mapping.kind in ("call", "pairs") and not shared
    here = here and maps_here(sent, states=states * read, mapped=results * written)
    finals = int(final.sum())
    size_of_states = results * written if here else states * read + weights(sent)
    return Traffic(
        steps=bool(len(final)),
        states=results if here else states,
        distributions=finals,
        bytes=size_of_states + finals * sweep.source.vocab_size * _LOGPROB,
        mapped_here=here,
    )


def _is_made(planned: Plan) -> bool:
    """True if states are made of several, or come from files; these cannot be mapped before they travel."""
    source, target = planned.sweep.scope.source, planned.sweep.scope.target
    return any((source.vector, source.minus, source.mean, target.soft_prompt))


def _positions(planned: Plan, states: Ints) -> int:
    """Return the number of positions of hidden states."""
    cells = planned.sweep.cells
    return int(cells.origin_positions.counts[planned.sweep.states.origin(states)].sum())


def size(tensor: torch.Tensor) -> int:
    """Return the size of a tensor in bytes."""
    return tensor.numel() * tensor.element_size()


def weights(call: Any) -> int:
    """Return the size of a mapping's weights in bytes; 0 for a function."""
    if isinstance(call, Mapping):
        return sum(size(tensor) for parts in call.values() for tensor in parts.values())
    if not isinstance(call, torch.nn.Module):
        return 0
    tensors: Iterable[torch.Tensor] = (*call.parameters(), *call.buffers())
    return sum(map(size, tensors))

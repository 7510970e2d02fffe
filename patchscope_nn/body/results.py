"""What target passes return: readouts are called in their passes, and results collected after the last one.

Until then the columns stay on the device, so that a pass can begin before the one before it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from patchscope_nn.body.devices import in_sent
from patchscope_nn.body.program import ReadoutProgram, TargetProgram


def in_readout(
    model: Any,
    readout: ReadoutProgram,
    logits: Any,
    cache: Any,
    *,
    finals: torch.Tensor | None,
    written: dict[str, torch.Tensor],
    plain: Any = None,
    hear: Any = None,
) -> dict[str, Any]:
    """Call the body of the readout. The prompts have been read, and nothing is patched from here on.

    Args:
        model: M*, as a function.
        readout: The program of the readout.
        logits: (n_cells, vocab) at the positions that are read; None for a readout that does not unembed.
        cache: Keys and values, a row for each cell; only for readouts that decode.
        finals: The distributions that source passes have read.
        written: As in `PatchedRun`.
        plain: M* without any patch, as a function; None if `model` is that.
        hear: Called while the pass runs (see `contexts.Hear`); may be None.

    Returns:
        The columns, on the devices where they were computed.
    """
    if hear is not None:
        hear([], [])
    known = ("n_cells", "numbered", "extra", "eos", "leaving", "mixed", "rereads", "stepwise")
    run = SimpleNamespace(
        forward=model,
        plain=plain or model,
        logits=logits,
        cache=cache,
        mask=None if readout["mask"] is None else in_sent(readout["mask"], logits.device),
        finals=finals,
        written=written,
        heard=hear,
        **{name: readout[name] for name in known},  # type: ignore[literal-required]
    )
    columns = readout["read"](run, **readout["asked"])
    if not isinstance(columns, dict):
        kind = type(columns).__name__
        raise TypeError(f"the body of a readout returns a dict of columns, and not a {kind}")
    if readout["unembeds"] and not readout["finite"] and "sound" not in columns:
        columns["sound"] = logits.float().amax(-1)
    # On a server, a mapping with parameters records gradients.
    return {name: in_each(part, torch.Tensor.detach) for name, part in columns.items()}


def in_pending(
    columns: dict[str, Any], target: TargetProgram, written: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return what `in_results` needs of a pass, on the device: its columns, and its writes that are wrong."""
    n_cells = target["cells"]
    wrong = {name: in_cells_with(written, name, n_cells) for name in ("states", "replaced")}
    return {"columns": columns, **wrong}


def in_results(pending: dict[str, Any], target: TargetProgram, states: torch.Tensor | None) -> dict[str, Any]:
    """Return the columns of a pass on the CPU.

    If a cell has a number that is not finite, the column `not_finite` says where the first one arose.
    """
    columns = {name: in_each(part, torch.Tensor.cpu) for name, part in pending["columns"].items()}
    readout, n_cells = target["readout"], target["cells"]
    new, replaced = (pending[name].cpu() > 0 for name in ("states", "replaced"))
    if readout["unembeds"]:
        sound = [columns.pop("sound")] if "sound" in columns else []
        finite = [columns[name] for name in readout["finite"] if name in columns]
        bad = new | in_any(n_cells, [*sound, *finite])
        # A token that is ruled out (its logit is -inf) has an infinite log-probability, so only NaN counts.
        compared = in_any(n_cells, list(columns.values()), nan=True)
    else:
        bad = new
        compared = replaced if readout["clean"] else torch.zeros_like(bad)
    if not (bad | compared).any():
        return columns
    read = torch.zeros_like(bad)
    for write in target["writes"].values():
        if states is not None and write["states"] is not None:
            wrong = ~states[write["states"].to(states.device)].float().isfinite().all(-1).cpu()
            read[write["cells"][wrong]] = True
    reasons: list[str | None] = []
    for cell in range(n_cells):
        reason = "compared" if compared[cell] else None
        if bad[cell]:
            reason = "logits"
            if new[cell]:
                reason = "replaced" if replaced[cell] else "written"
            if read[cell]:
                reason = "read"
        reasons.append(reason)
    return columns | {"not_finite": reasons}


def in_each(values: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change a column, or each tensor in it if it is a list."""
    if isinstance(values, torch.Tensor):
        return change(values)
    return [change(value) if isinstance(value, torch.Tensor) else value for value in values]


def in_cells_with(written: dict[str, torch.Tensor], name: str, n_cells: int) -> torch.Tensor:
    """Return (n_cells,) how many states that are not finite each cell has written, or replaced."""
    if not written:
        return torch.zeros(n_cells, dtype=torch.int32)
    wrong = ~written[name].float().isfinite().all(-1)
    # Counted on the device: to choose the cells there, the host would have to wait for their number.
    counts = torch.zeros(n_cells, dtype=torch.int32, device=wrong.device)
    return counts.index_add(0, written["cells"], wrong.int())


def in_any(n_cells: int, columns: list[Any], *, nan: bool = False) -> torch.Tensor:
    """Return (n_cells,) which cells have a number that is not finite, or with `nan` one that is NaN."""
    cells = torch.zeros(n_cells, dtype=torch.bool)
    for column in columns:
        if isinstance(column, torch.Tensor):
            if column.is_floating_point():
                wrong = column.isnan() if nan else ~column.isfinite()
                cells |= wrong.reshape(n_cells, -1).any(-1)
        else:
            for cell, value in enumerate(column):
                # NaN differs from itself, and so does the difference of an infinity to itself.
                if any(number != number if nan else number - number != 0 for number in in_numbers(value)):  # noqa: PLR0124
                    cells[cell] = True
    return cells


def in_numbers(value: Any) -> list[float]:
    """Return the numbers in nested lists."""
    if isinstance(value, list):
        if {*map(type, value)} == {float}:
            return value
        return [number for part in value for number in in_numbers(part)]
    return [value] if isinstance(value, float) else []

"""Prompt ensembles: what several target prompts say of one state, put together. Pure.

Some prompts bring words of their own; what all of them say is the state's (Minder et al. 2025, arXiv
2510.13900, who intersect the top tokens of three identity prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from patchscope_nn.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

#: What the members of an ensemble share.
_SHARED = (
    *("row", "control", "source_prompt", "source_position", "source_token", "source_layer"),
    *("target_layer", "source_model", "target_model", "mapping", "scale", "sample"),
)


def combine(table: pd.DataFrame, *, how: Literal["intersect", "average"]) -> pd.DataFrame:
    """Put the top tokens of several target prompts together, state by state.

    Args:
        table: A run's table, with `top_ids`, `top_tokens` and `top_probs`.
        how: `intersect`: the tokens among the top of every prompt; `average`: all of them. Both by their mean
            probability, in which a token counts 0 where it is not among the top.

    Returns:
        A row for each state, with what its members share, `n_prompts`, `top_ids`, `top_tokens` and
        `top_probs`.

    Raises:
        InputError: The table holds no next tokens.
    """
    import pandas as pd

    if "top_ids" not in table.columns:
        raise InputError(
            "an ensemble puts top tokens together, and this run has none.", hint="Use readout: next_token."
        )
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        if row["error"] is None:
            groups.setdefault(tuple(_hashable(row[name]) for name in _SHARED), []).append(row)
    found = [
        {name: members[0][name] for name in _SHARED}
        | {"n_prompts": len(members)}
        | _together(members, intersect=how == "intersect")
        for members in groups.values()
    ]
    columns = [*_SHARED, "n_prompts", "top_ids", "top_tokens", "top_probs"]
    return pd.DataFrame(found, columns=columns)


def _hashable(value: Any) -> Any:
    return str(value)


def _together(members: Sequence[dict[str, Any]], *, intersect: bool) -> dict[str, list[Any]]:
    names: dict[int, str] = {}
    probs: dict[int, list[float]] = {}
    for member in members:
        for token, text, prob in zip(
            member["top_ids"], member["top_tokens"], member["top_probs"], strict=True
        ):
            names[token] = text
            probs.setdefault(token, []).append(prob)
    kept = [token for token, given in probs.items() if not intersect or len(given) == len(members)]
    mean = {token: sum(probs[token]) / len(members) for token in kept}
    kept.sort(key=lambda token: -mean[token])
    return {
        "top_ids": kept,
        "top_tokens": [names[token] for token in kept],
        "top_probs": [mean[token] for token in kept],
    }

"""Prompt ensembles: combine the next-token predictions that several target prompts give for one state.

Each prompt favours some tokens of its own. The tokens that all prompts predict come from the state (Minder et
al. 2025, arXiv 2510.13900, who intersect the top tokens of three identity prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from patchscope_nn.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

#: The columns whose values all members of an ensemble share.
_SHARED = (
    *("row", "control", "source_prompt", "source_position", "source_token", "source_layer"),
    *("target_layer", "source_model", "target_model", "mapping", "scale", "sample"),
)


def combine(table: pd.DataFrame, *, how: Literal["intersect", "average"]) -> pd.DataFrame:
    """Combine the top tokens of several target prompts, state by state.

    `intersect` keeps the tokens that are among the top tokens of every prompt, `average` keeps all. Both rank
    tokens by mean probability; a token counts as 0 for a prompt that does not list it.

    Returns:
        A row for each state: the columns that its members share, `n_prompts`, `top_ids`, `top_tokens` and
        `top_probs`.

    Raises:
        InputError: The table has no next-token predictions.
    """
    import pandas as pd

    if "top_ids" not in table.columns:
        raise InputError(
            "an ensemble combines top tokens, and this run has none.", hint="Use readout: next_token."
        )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        if row["error"] is None:
            groups.setdefault(tuple(str(row[name]) for name in _SHARED), []).append(row)
    combined = [
        [*(members[0][name] for name in _SHARED), len(members), *_top(members, intersect=how == "intersect")]
        for members in groups.values()
    ]
    return pd.DataFrame(combined, columns=[*_SHARED, "n_prompts", "top_ids", "top_tokens", "top_probs"])


def _top(members: Sequence[dict[str, Any]], *, intersect: bool) -> tuple[list[int], list[str], list[float]]:
    """Return the ids, texts and mean probabilities of the combined top tokens."""
    texts: dict[int, str] = {}
    probs: dict[int, list[float]] = {}
    for member in members:
        names = ("top_ids", "top_tokens", "top_probs")
        for token, text, prob in zip(*(member[name] for name in names), strict=True):
            texts[token] = text
            probs.setdefault(token, []).append(prob)
    mean = {
        token: sum(values) / len(members)
        for token, values in probs.items()
        if not intersect or len(values) == len(members)
    }
    kept = sorted(mean, key=lambda token: -mean[token])
    return kept, [texts[token] for token in kept], [mean[token] for token in kept]

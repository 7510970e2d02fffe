"""A readout of the largest logit."""

from __future__ import annotations

from typing import Any, ClassVar

import patchscope_nn as ps


def read_max_logit(run, *, scale: float) -> dict[str, Any]:
    """Read the largest logit of each cell; this function is sent to where the model runs."""
    values, ids = run.logits.float().max(dim=-1)
    return {"max_id": ids, "max_logit": scale * values}


@ps.register_readout
class MaxLogit(ps.Readout):
    """Readout: the largest logit of the next token, and its token.

    Its columns are `max_token` and `max_logit`.
    """

    name = "max_logit"
    body = f"{__name__}:read_max_logit"
    columns: ClassVar = {"max_token": "text", "max_logit": "number"}
    says = "max_token"
    title = "token of the largest logit"
    action = "{} then gave each token a logit"
    details = ("max_logit",)

    scale: float = 1.0
    """The logit is multiplied by this."""

    def lower(self, cells):
        """Return the body's arguments, as plain values."""
        return {"scale": self.scale}

    def tabulate(self, raw, tokens, texts):
        """Return the table's columns from those of the body."""
        return {"max_token": tokens.tokens(raw["max_id"]), "max_logit": raw["max_logit"]}

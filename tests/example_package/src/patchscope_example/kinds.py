"""A kind of readout, and a site."""

from typing import ClassVar

import patchscope_nn as ps

gate = ps.Site(name="gate", modules=("mlp.gate_proj",), label="Gates of MLPs")


def read_logit_gap(run):
    """The two largest logits of each cell; travels to where the model runs."""
    best = run.logits.float().topk(2, dim=-1).values
    return {"logit_gap": best[:, 0] - best[:, 1]}


class LogitGap(ps.Readout):
    """Readout: by how much the most likely next token leads."""

    name = "logit_gap"
    body = f"{__name__}:read_logit_gap"
    columns: ClassVar = {"logit_gap": "number"}

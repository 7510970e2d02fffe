"""The Patchscope: source, target, mapping and readout."""

from __future__ import annotations

from pydantic import Field, model_validator

from patchscope_nn._util.checking import Spec
from patchscope_nn.spec.mapping import AnyMapping
from patchscope_nn.spec.readout_registry import AnyReadout, default_readout
from patchscope_nn.spec.sides import Source, Target


class Patchscope(Spec):
    """A Patchscope: (S, i, l, M) --f--> (T, i*, l*, M*), and its readout."""

    source: Source
    """Where the hidden state is read."""
    target: Target = Target()
    """Where the mapped state is written."""
    mapping: AnyMapping = "identity"
    """f: `identity`, `target_norm` (scaled to the norm of the state it replaces), `{affine:
    file.safetensors}`, `{fitted: file.safetensors}`, `{fit: {kind: affine, ...}}` (fitted before the run),
    `aligned` (identity within one model, `{fit: affine}` between two), a published lens as `{tuned_lens:
    folder}` or `{jacobian_lens: file.pt}`, or `{function: module:name}`. In Python also an `Affine`, a
    `Fitted`, a torch module, or a function from (..., d_model) to (..., d_model of the target)."""
    readout: AnyReadout = Field(default_factory=default_readout)
    """What is read from the patched run."""

    @model_validator(mode="after")
    def _together(self) -> Patchscope:
        source, target = self.source, self.target
        bare = target.prompt is None and not target.prompts
        if bare and source.prompt is None:
            raise ValueError("a vector has no prompt of its own; give target.prompt")
        if bare and source.mean is not None and source.mean != "positions":
            raise ValueError("the mean of several rows has no prompt of its own; give target.prompt")
        self.readout.check_target(target)
        return self

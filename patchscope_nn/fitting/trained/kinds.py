"""The kinds that are trained, by name. A new kind is a file that describes itself, and one line here."""

from __future__ import annotations

from patchscope_nn.errors import MappingError, did_you_mean
from patchscope_nn.fitting.trained import jacobian, lre, soft_prompt, through_text, tuned_lens
from patchscope_nn.fitting.trained.kind import MappingKind, TrainedKind

KINDS: dict[str, TrainedKind] = {
    kind.name: kind
    for kind in (tuned_lens.KIND, jacobian.KIND, soft_prompt.KIND, lre.KIND, *through_text.KINDS.values())
}
TRAINED = tuple(KINDS)


def trained_kind(name: str) -> TrainedKind:
    """The kind of a name; raises a `MappingError` if there is none."""
    if name not in KINDS:
        raise MappingError(f"{name!r} is not a kind that is trained.", hint=did_you_mean(name, TRAINED))
    return KINDS[name]


def mapping_kind(name: str) -> MappingKind:
    """The kind of a name; raises a `MappingError` if there is none, or if it does not give a mapping."""
    kind = trained_kind(name)
    if not isinstance(kind, MappingKind):
        raise MappingError(f"{name} is not a mapping.", hint=f"Fit it first: patchscope fit {name}.")
    return kind

"""The two sides of a Patchscope: where a state is read, and where it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from patchscope_nn._util.checking import Spec
from patchscope_nn.spec.forms import closed, listed
from patchscope_nn.spec.layers import SourceLayers, TargetLayers
from patchscope_nn.spec.positions import Positions
from patchscope_nn.spec.prompts import Prompt
from patchscope_nn.spec.sites import RESIDUAL, SiteName
from patchscope_nn.spec.write import Corrupt, Cut, Scales, Write

#: `unpatched`: T without a patch. `random`: a random state of the same norm. `shuffled`: another row's state.
#: `text-only`: T with the source's text (a chat with its template applied) in place of the patched tokens,
#: without a patch.
Control: TypeAlias = Literal["unpatched", "random", "shuffled", "text-only"]
#: The controls that do not write a state, and therefore have neither layer nor scale.
STATELESS: tuple[Control, ...] = ("unpatched", "text-only")


#: States are averaged over positions, over all data rows, or over the rows of each value of a column.
Mean: TypeAlias = Literal["positions", "rows"] | tuple[Literal["rows"], str]


def _mean(value: Any) -> Any:
    return ("rows", value["rows"]) if isinstance(value, Mapping) and set(value) == {"rows"} else value


AnyMean = Annotated[
    Mean | None,
    BeforeValidator(_mean),
    PlainSerializer(lambda mean: {mean[0]: mean[1]} if isinstance(mean, tuple) else mean),
    WithJsonSchema({"anyOf": [{"enum": ["positions", "rows", None]}, closed(rows={"type": "string"})]}),
]


def _as_vector(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class Vector(Spec):
    """A vector from a file instead of a prompt: a steering vector, or a direction of an SAE."""

    file: Annotated[str, Field(min_length=1)]
    """A safetensors file, or `builtin:directions`."""
    key: str | None = None
    """The tensor in the file, (d_model,) or (n, d_model); None if the file holds only one tensor."""
    index: int | str | None = None
    """The row of a matrix; `{column}` placeholders are filled by the data."""


class Source(Spec):
    """Where the hidden state is read: S, i, l and M."""

    prompt: Prompt | None = None
    """S: a text, chat messages, or token ids; `{column}` placeholders are filled by the data."""
    position: Positions = -1
    """i: an index, a text of the prompt, a span, a list, `{every: text}`, or `{each: ...}`."""
    layer: SourceLayers = "all"
    """l: a block, a list, a range, `all` or `embed`."""
    site: SiteName = RESIDUAL.name
    """`residual` (the block's output), `before` (its input), `attention`, `mlp`, or a site of your own
    (docs/extending/site.md)."""
    model: str | None = None
    """M: a Hugging Face id, a folder, or `builtin:...`; None takes the run's model."""
    mean: AnyMean = None
    """`positions` takes the mean of the states at i; `rows` the mean over all data rows, which become a
    single row; `{rows: column}` the mean over the rows of each value of a column."""
    minus: Prompt | None = None
    """A prompt whose state, at the same position and layer, is subtracted."""
    vector: Annotated[Vector | None, BeforeValidator(_as_vector)] = None
    """A vector from a file, instead of a prompt; it is used as the state of every l."""

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.prompt is None) == (self.vector is None):
            raise ValueError("should have either a prompt or a vector from a file")
        if self.vector is not None and (self.mean is not None or self.minus is not None):
            raise ValueError("mean and minus need the states of a prompt; leave them out with a vector")
        return self


class Target(Spec):
    """Where the mapped state is written: T, i*, l* and M*."""

    prompt: Prompt | None = None
    """T, as in `Source`; None is the source's own prompt (T = S). `{source_layer}` stands for l."""
    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(listed)] = ()
    """Several T instead of one, each with its own cells: a prompt ensemble."""
    combine: Literal["intersect", "average"] = "intersect"
    """How the top tokens of `prompts` are combined in `ensemble.csv` and `Run.ensemble`: `intersect` or
    `average`."""
    position: Positions | None = None
    """i*, as in `Source`; None is the source's own position if T = S, otherwise the last token. Several
    tokens take either one state each, or all the same state."""
    layer: TargetLayers = "same"
    """l*, as in `Source`; `same` pairs l* with l, anything else is crossed with it."""
    site: SiteName = RESIDUAL.name
    """`residual`, `before`, `attention`, `mlp`, or a site of your own."""
    model: str | None = None
    """M*; None is the source's model."""
    adapter: str | None = None
    """A LoRA adapter (peft) that is merged into M*: a folder or a Hugging Face id."""
    write: Write = "replace"
    """How the state is written: `replace`; `add`; `add_matched` (scaled to the norm of the state it is added
    to); `{blend: alpha}` (alpha f(h) + (1 - alpha) of the present state); `zero`; `{noise: sigma}` (adds
    noise of sigma standard deviations of the state); `{cut: {position: ...}}` (cuts attention from i* to
    other tokens)."""
    scale: Scales = (1.0,)
    """The factor of f(h), applied after `add_matched` has set its norm; several are crossed with the
    layers."""
    window: Annotated[int, Field(ge=1)] = 1
    """The number of blocks, from l* on, in which the write is made."""
    states: Literal["one", "own"] = "one"
    """With a window, `one` writes the state of l in all blocks, `own` the state of l + k in l* + k."""
    every_step: bool = False
    """Write at every decoded token too, not only while T is read."""
    corrupt: Corrupt | None = None
    """Noise on T's embeddings."""
    soft_prompt: str | None = None
    """A safetensors file with `soft_prompt`, (k, d_model): learned embeddings of T's first k tokens."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Target:
        if self.prompt is not None and self.prompts:
            raise ValueError("give either prompt or prompts")
        if self.states == "own" and self.window == 1:
            raise ValueError("states: own needs a window; give window, 2 or more")
        return self

    @property
    def mode(self) -> str:
        """The name of the write."""
        return self.write if isinstance(self.write, str) else self.write[0]

    @property
    def cut(self) -> Cut | None:
        """The cut that the write makes; None for other writes."""
        return self.write[1] if isinstance(self.write, tuple) and isinstance(self.write[1], Cut) else None

    @property
    def amount(self) -> float:
        """The number of a write with a number (alpha or sigma); 0 for other writes."""
        return self.write[1] if isinstance(self.write, tuple) and isinstance(self.write[1], float) else 0.0

    @property
    def alters(self) -> bool:
        """True if T is changed in other ways than by a write at i* and l* while it is read."""
        return bool(self.corrupt or self.soft_prompt or self.cut or self.every_step)

    @property
    def needs_state(self) -> bool:
        """True if the write uses a source state."""
        return self.mode not in ("zero", "noise", "cut")

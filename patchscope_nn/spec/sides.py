"""The two sides of a Patchscope: where a state is taken, and where it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from patchscope_nn._util.checking import Spec
from patchscope_nn.spec.layers import SourceLayers, TargetLayers
from patchscope_nn.spec.positions import Positions
from patchscope_nn.spec.prompts import Prompt
from patchscope_nn.spec.sites import RESIDUAL, SiteName
from patchscope_nn.spec.write import Corrupt, Cut, Scales, Write

#: `unpatched`: T as it is. `random`: a random state of the same norm. `shuffled`: another row's state.
#: `text-only`: T with the source's text (a chat after its template) in the place of the patched tokens, and
#: no state.
Control: TypeAlias = Literal["unpatched", "random", "shuffled", "text-only"]
#: Those that write no state, and so have no layer and no scale.
STATELESS: tuple[Control, ...] = ("unpatched", "text-only")


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


#: What is averaged: the positions, the data rows, or the rows of each value of a column.
Mean: TypeAlias = Literal["positions", "rows"] | tuple[Literal["rows"], str]


def _mean(value: Any) -> Any:
    return ("rows", value["rows"]) if isinstance(value, Mapping) and set(value) == {"rows"} else value


AnyMean = Annotated[
    Mean | None,
    BeforeValidator(_mean),
    PlainSerializer(lambda mean: {mean[0]: mean[1]} if isinstance(mean, tuple) else mean),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["positions", "rows", None]},
                {
                    "type": "object",
                    "properties": {"rows": {"type": "string"}},
                    "required": ["rows"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


def _vector(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class Vector(Spec):
    """A vector that stands in a file, and comes from no prompt: a steering vector, an SAE's direction.

    Attributes:
        file: A safetensors file, or `builtin:directions`.
        key: The tensor in it, (d_model,) or (n, d_model); None where the file holds one tensor.
        index: The row of a matrix; `{column}` placeholders are filled by the data.
    """

    file: Annotated[str, Field(min_length=1)]
    key: str | None = None
    index: int | str | None = None


class Source(Spec):
    """Where the hidden state is taken: S, i, l and M.

    Attributes:
        prompt: S: a text, chat messages, or token ids; `{column}` placeholders are filled by the data.
        position: i: an index, a text of the prompt, a span, a list, `{every: text}`, or `{each: ...}`.
        layer: l: a block, a list, a range, `all` or `embed`.
        site: `residual` (the block's output), `before` (its input), `attention`, `mlp`, or a site of your own
            (docs/extending/site.md).
        model: M: a Hugging Face id, a folder, or `builtin:...`; None takes the run's model.
        mean: `positions`: the mean of the states at i is taken, one vector; `rows`: the mean over all data
            rows, which then make one; `{rows: column}`: the mean over the rows of each value of a column.
        minus: A prompt whose state, at the same position and layer, is taken off.
        vector: Instead of a prompt, a vector from a file; it is taken as a state of each l.
    """

    prompt: Prompt | None = None
    position: Positions = -1
    layer: SourceLayers = "all"
    site: SiteName = RESIDUAL.name
    model: str | None = None
    mean: AnyMean = None
    minus: Prompt | None = None
    vector: Annotated[Vector | None, BeforeValidator(_vector)] = None

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.prompt is None) == (self.vector is None):
            raise ValueError("should have a prompt, or else a vector from a file")
        if self.vector is not None and (self.mean is not None or self.minus is not None):
            raise ValueError("a vector has no mean and no minus, which are made of prompts' states")
        return self


class Target(Spec):
    """Where the mapped state is written: T, i*, l* and M*.

    Attributes:
        prompt: T, as in `Source`; None is the source's own prompt (T = S). `{source_layer}` is l.
        prompts: Several T instead of one, for each of which there are cells: a prompt ensemble.
        combine: How the top tokens of `prompts` are put together, in `ensemble.csv` and `Run.ensemble`:
            `intersect` or `average`.
        position: i*, as in `Source`; None is the source's own position where T = S, else the last token.
            Several tokens take several states one to one, or each the same one.
        layer: l*, as in `Source`; `same` pairs l* with l, anything else is crossed with it.
        site: `residual`, `before`, `attention`, `mlp`, or a site of your own.
        model: M*; None is the source's model.
        adapter: A LoRA adapter (peft) that M* wears: a folder or a Hugging Face id.
        write: How: `replace`; `add`; `add_matched` (added with the norm of the state it is added to);
            `{blend: alpha}` (alpha f(h), the rest what was there); `zero`; `{noise: sigma}` (noise of sigma
            standard deviations of the state); `{cut: {position: ...}}` (attention from i* to other tokens).
        scale: What f(h), matched where the write does that, is multiplied with; several are crossed with
            the layers.
        window: In how many blocks from l* on the write is made.
        states: With a window, `one` writes the state of l in all its blocks, `own` that of l + k in l* + k.
        every_step: Write at every token that is decoded, too, and not only while T is read.
        corrupt: Noise on T's embeddings.
        soft_prompt: A safetensors file with `soft_prompt`, (k, d_model): learned embeddings of T's first k
            tokens.
    """

    prompt: Prompt | None = None
    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(_listed)] = ()
    combine: Literal["intersect", "average"] = "intersect"
    position: Positions | None = None
    layer: TargetLayers = "same"
    site: SiteName = RESIDUAL.name
    model: str | None = None
    adapter: str | None = None
    write: Write = "replace"
    scale: Scales = (1.0,)
    window: Annotated[int, Field(ge=1)] = 1
    states: Literal["one", "own"] = "one"
    every_step: bool = False
    corrupt: Corrupt | None = None
    soft_prompt: str | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Target:
        if self.prompt is not None and self.prompts:
            raise ValueError("give either prompt or prompts")
        if self.states == "own" and self.window == 1:
            raise ValueError("states: own says what a window writes; give window, 2 or more")
        return self

    @property
    def mode(self) -> str:
        """The name of the write."""
        return self.write if isinstance(self.write, str) else self.write[0]

    @property
    def cut(self) -> Cut | None:
        """What of the write is a cut."""
        return self.write[1] if isinstance(self.write, tuple) and isinstance(self.write[1], Cut) else None

    @property
    def amount(self) -> float:
        """The number of a write that has one."""
        return self.write[1] if isinstance(self.write, tuple) and isinstance(self.write[1], float) else 0.0

    @property
    def alters(self) -> bool:
        """Whether more is done to T than to write at i* and l* while it is read."""
        return bool(self.corrupt or self.soft_prompt or self.cut or self.every_step)

    @property
    def needs_state(self) -> bool:
        """Whether the write takes a state at all."""
        return self.mode not in ("zero", "noise", "cut")

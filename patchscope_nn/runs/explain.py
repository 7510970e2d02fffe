"""A quick look at one token: a description and the next token for its hidden state at every layer.

Two Patchscopes read the same states. With the few-shot description prompt (section 4.3), the model describes
the state in words; with the token-identity prompt (section 4.1), it predicts a next token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn.backends import Places
from patchscope_nn.readouts import Generate, NextToken
from patchscope_nn.runs.execute import Execution, Progress
from patchscope_nn.runs.loading import load_models
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.runs.prepared import Prepared
from patchscope_nn.runs.run import run_each
from patchscope_nn.spec import Patchscope, Readout, Source, Target, prompts


@dataclass(frozen=True, kw_only=True)
class LayerSays:
    """The description of one state.

    Attributes:
        layer: The source layer l; -1 is the embedding; None for the unpatched control.
        target_layer: The target layer l*.
        text: The description that the model generated, up to the end of its line.
        next_token: The top token of the token-identity prompt.
        probability: The probability of `next_token`; None if there is an error.
        error: Why the state could not be described; None if it could.
    """

    layer: int | None
    target_layer: int | None
    text: str
    next_token: str
    probability: float | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Look:
    """A quick look at one token of one prompt.

    Attributes:
        prompt: The source prompt, as the model read it.
        position: The position that was read, from the left.
        token: The token at this position.
        model: M's name, and M*'s if it is another model.
        says: The unpatched control first, then one entry for each (l, l*).
    """

    prompt: str
    position: list[int]
    token: list[str]
    model: str
    says: tuple[LayerSays, ...]


@checked
def explain(
    prompt: Any,
    *,
    position: Any = -1,
    layer: Any = "all",
    target_layer: Any = "same",
    max_new_tokens: int = 16,
    remote: bool | str = False,
    source_remote: bool | str | None = None,
    dtype: Any = "auto",
    device_map: Any = None,
    engine: str | None = None,
    engine_args: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **models: Any,
) -> Look:
    """Ask a model what its hidden states mean: one token of one prompt, at every layer.

    Args:
        prompt: The source prompt.
        position: The token to read.
        layer: The layers to read.
        target_layer: The layers to write to; `same` is the layer that the state comes from.
        max_new_tokens: The maximum number of tokens to generate.
        remote: As in `run`.
        source_remote: As in `run`.
        dtype: As in `run`.
        device_map: As in `run`.
        engine: As in `run`.
        engine_args: As in `run`.
        progress: Called with (cells done, total cells).
        **models: `model`, `source_model` and `target_model`, as in `run`.

    Returns:
        The descriptions, and those of the unpatched control.

    Raises:
        InputError: The prompt, position, layers or models are not valid.
    """
    loading = {"dtype": dtype, "device_map": device_map, "engine": engine, "engine_args": engine_args}
    places = Places.of(remote, source_remote, **loading)
    prepared = prepare_look(
        Source(prompt=prompt, position=position, layer=layer),
        target_layer=target_layer,
        max_new_tokens=max_new_tokens,
        places=places,
        **models,
    )
    return look(prepared, progress=progress)


def prepare_look(
    source: Source, *, target_layer: Any, max_new_tokens: int, places: Places, **models: Any
) -> Prepared:
    """Prepare the two runs of a quick look, which share their models.

    Args:
        source: The states to read; braces in its prompt are plain text, since there is no data.
        target_layer: As in `explain`.
        max_new_tokens: As in `explain`.
        places: Where the models run.
        **models: As in `explain`.

    Raises:
        InputError: As in `explain`.
    """
    if source.prompt is not None:
        source = source.model_copy(update={"prompt": prompts.literal(source.prompt)})
    source_model, target_model = load_models(places=places, **models)
    # Each line is an entry of the few-shot list, so a description ends with its line.
    readings: dict[str, tuple[str, Readout]] = {
        "description": (prompts.DESCRIBE, Generate(max_new_tokens=max_new_tokens, stop="\n")),
        "token identity": (prompts.IDENTITY, NextToken(top_k=1)),
    }
    runs = {
        name: prepare(
            Patchscope(
                source=source, target=Target(prompt=target_prompt, layer=target_layer), readout=readout
            ),
            places=places,
            controls=("unpatched",),
            source_model=source_model,
            target_model=target_model,
        ).only
        for name, (target_prompt, readout) in readings.items()
    }
    return Prepared(name="explain", title="A quick look", runs=runs)


def look(prepared: Prepared, *, progress: Progress | None = None) -> Look:
    """Run a quick look that `prepare_look` prepared; `progress` as in `explain`."""
    described, repeated = (run.rows for run in run_each(prepared, Execution(progress=progress)).values())
    first = described[1]
    names = dict.fromkeys((first["source_model"], first["target_model"]))
    return Look(
        prompt=first["source_prompt"],
        position=first["source_position"],
        token=first["source_token"],
        model=" -> ".join(names),
        says=tuple(_says(text, token) for text, token in zip(described, repeated, strict=True)),
    )


def _says(text: Any, token: Any) -> LayerSays:
    return LayerSays(
        layer=text["source_layer"],
        target_layer=text["target_layer"],
        text=text["text"] or "",
        next_token="" if token["error"] else token["top_tokens"][0],
        probability=None if token["error"] else token["top_probs"][0],
        error=text["error"] or token["error"],
    )

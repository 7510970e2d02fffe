"""The quick look: layer by layer, what the model says a hidden state is, and what it would say next.

Two Patchscopes read the same states: the few-shot description prompt (section 4.3), which lets the model
describe what it finds, and the token-identity prompt (section 4.1), which lets it repeat the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchscope_nn.spec import prompts
from patchscope_nn._util.arguments import checked
from patchscope_nn.runs.execute import Progress, run
from patchscope_nn.runs.prepare import load_models
from patchscope_nn.runs.folder import Run
from patchscope_nn.readouts import Generate, NextToken
from patchscope_nn.spec import Patchscope, Readout, Source, Target


@dataclass(frozen=True, kw_only=True)
class LayerSays:
    """What one state is said to be.

    Attributes:
        layer: l; -1 is the embedding; None for the unpatched control.
        target_layer: l*.
        text: The description the model generated, up to the end of its line.
        next_token: The top token of the token-identity prompt.
        probability: Its probability; None where there is none.
        error: Why there is nothing; None where there is.
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
        token: Its token.
        model: M's name, and M*'s where it is another.
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
    progress: Progress | None = None,
    **models: Any,
) -> Look:
    """Ask a model what its hidden states mean, one token of one prompt at every layer.

    Args:
        prompt: The source prompt.
        position: Which token.
        layer: Which layers.
        target_layer: Where the states are written; `same` is the layer they come from.
        max_new_tokens: The most tokens to generate.
        remote: As in `run`.
        source_remote: As in `run`.
        progress: Called with (cells done, cells in all).
        **models: `model`, `source_model`, `target_model`, `dtype` and `device_map`, as in `prepare`.

    Returns:
        What was said.

    Raises:
        InputError: The prompt, position, layers or models do not resolve.
    """
    source = Source(prompt=prompt, position=position, layer=layer)
    if source.prompt is not None:  # there is no data here, so that braces in the prompt are text
        source = source.model_copy(update={"prompt": prompts.literal(source.prompt)})
    ours, theirs = load_models(remote=remote, source_remote=source_remote, **models)
    # One line is one entry of the few-shot list; what follows it is the next entry, not this one's.
    readings: tuple[tuple[str, Readout], ...] = (
        (prompts.DESCRIBE, Generate(max_new_tokens=max_new_tokens, stop="\n")),
        (prompts.IDENTITY, NextToken(top_k=1)),
    )
    finished: list[Run] = []
    for number, (target_prompt, readout) in enumerate(readings):
        scope = Patchscope(
            source=source, target=Target(prompt=target_prompt, layer=target_layer), readout=readout
        )
        step = _part(progress, number, len(readings))
        finished.append(
            run(
                scope,
                controls=("unpatched",),
                remote=remote,
                source_remote=source_remote,
                progress=step,
                source_model=ours,
                target_model=theirs,
            )
        )
    described, repeated = (one.rows for one in finished)
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


def _part(progress: Progress | None, number: int, parts: int) -> Callable[[int, int], None] | None:
    """The progress of one run of several that are alike."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, parts * total)

"""The reference of the proof: the model's own forward pass under plain PyTorch hooks, without nnsight.

Every forward pass reads a whole prompt, without padding. The rows of a batch hold the same prompt with
different writes, but only if rows of a batch do not influence each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from patchscope_nn.errors import ModelError
from patchscope_nn.models import Model, input_device
from patchscope_nn.models.block import first_input, states_of, with_states
from patchscope_nn.spec import RESIDUAL, Site

#: How far a row of a batch may be from the same row alone, in standard deviations.
_ALONE = 1e-2


class Place(NamedTuple):
    """Where a state is."""

    layer: int
    site: Site = RESIDUAL


class Write(NamedTuple):
    """A state, (d_model,), that replaces the one at a place and position."""

    place: Place
    position: int
    state: torch.Tensor


class _Done(Exception):  # noqa: N818 (not an error: it ends a forward once everything has been read)
    """Raised by a hook, once everything has been read."""


class Hooks:
    """A transformers model whose states can be read and written.

    Attributes:
        causal: True if a token of a prompt never attends to those after it. If it does, decoding continues
            from the keys and values of the prompt, token by token, as the model's own `generate` does.
        incremental: True if one forward pass over a prompt and its continuation equals separate passes for
            each token of the continuation.
        batches: True if a row of a batch is the same as that row alone; None until that is known.
    """

    def __init__(self, model: Model) -> None:
        self.name, self.module, self.architecture = model.info.name, model.module, model.info.architecture
        self.device = input_device(model.module)
        self.causal, self.incremental = model.info.architecture.causal, True
        self.batches: bool | None = None
        # Logits of earlier passes: by prompt and write, then by the tokens that follow.
        self._known: dict[Any, dict[tuple[int, ...], torch.Tensor]] = {}

    def read(self, ids: Sequence[int], places: Sequence[Place]) -> dict[Place, torch.Tensor]:
        """The states at some places, each (n_tokens, d_model). The pass stops after the last of them."""
        states: dict[Place, torch.Tensor] = {}

        def record(place: Place, output: torch.Tensor) -> torch.Tensor:
            states[place] = output.view(len(ids), -1).clone()
            if len(states) == len(places):
                raise _Done
            return output

        with ExitStack() as stack, suppress(_Done):
            for place in places:
                stack.enter_context(self._hook(place, partial(record, place)))
            self._forward(torch.tensor([list(ids)]), use_cache=False)
        if silent := [place.layer for place in places if place not in states]:
            raise ModelError(
                f"{self.name} ({type(self.module).__name__}): block {silent[0]} does not run on the "
                "tokens of a text alone, so it has no hidden state.",
                hint="Use a model whose blocks all run on text.",
            )
        return states

    def logits(self, ids: Sequence[int], writes: Sequence[Write | None]) -> torch.Tensor:
        """The logits after every token, (n_writes, n_tokens, vocab), one row for each write."""
        if len(writes) > 1 and self.batches is False:
            return torch.cat([self.logits(ids, [write]) for write in writes])
        with self._written(writes, len(ids)):
            rows = self._forward(torch.tensor([list(ids)] * len(writes)), use_cache=False).logits.float()
        if len(writes) == 1 or self.batches:
            return rows
        alone = self.logits(ids, writes[-1:])
        self.batches = distance(rows[-1:], alone, alone) < _ALONE
        return rows if self.batches else self.logits(ids, writes)

    def continued(
        self, ids: Sequence[int], more: Sequence[int], write: Write | None, *, unpatched: bool = False
    ) -> torch.Tensor:
        """The logits that decide each token after a prompt, and one more token.

        Args:
            ids: The prompt.
            more: The tokens after it.
            write: The state that is written into the prompt, if any.
            unpatched: True if the same will be asked without the write; then one forward pass serves both.

        Returns:
            (len(more) + 1, vocab).
        """
        key = (*ids, write.place, write.position, id(write.state)) if write else tuple(ids)
        known = self._known.setdefault(key, {})
        longer = (after for after in known if self.incremental and after[: len(more)] == tuple(more))
        if (begun := next(longer, None)) is not None:
            return known[begun][: len(more) + 1]
        if not self.causal:
            logits = self._decoded(ids, more, write)
        elif self.incremental or write is None:
            rows = self.logits([*ids, *more], [write, None] if unpatched else [write])[:, len(ids) - 1 :]
            logits = rows[0]
            if unpatched:
                self._known.setdefault(tuple(ids), {})[tuple(more)] = rows[1]
        else:
            steps = [[*ids, *more[:count]] for count in range(len(more) + 1)]
            logits = torch.stack([self.logits(step, [write])[0, -1] for step in steps])
        known[tuple(more)] = logits
        return logits

    def scored(self, ids: Sequence[int], more: Sequence[int], write: Write) -> torch.Tensor:
        """The logits that score each token of a continuation, (len(more), vocab), from one forward pass."""
        if not self.causal or self.incremental:
            return self.continued(ids, more[:-1], write)
        return self.logits([*ids, *more], [write])[0, len(ids) - 1 : -1]

    def _decoded(self, ids: Sequence[int], more: Sequence[int], write: Write | None) -> torch.Tensor:
        with self._written([write], len(ids)):
            output = self._forward(torch.tensor([list(ids)]), use_cache=True)
        rows = [output.logits[0, -1]]
        for token in more:
            output = self._forward(
                torch.tensor([[token]]), use_cache=True, past_key_values=output.past_key_values
            )
            rows.append(output.logits[0, -1])
        return torch.stack(rows).float()

    def noise(self, ids: Sequence[int]) -> float:
        """How far one more rounding of the embeddings moves the logits, in standard deviations."""
        embeddings = self.module.get_input_embeddings()

        def shake(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            shaken = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            return output + output * shaken * torch.finfo(output.dtype).eps / 2

        plain = self.logits(ids, [None])[0, -1]
        with embeddings.register_forward_hook(shake):
            return distance(self.logits(ids, [None])[0, -1], plain, plain)

    def _forward(self, ids: torch.Tensor, **options: Any) -> Any:
        if "cache" not in self.architecture.features:
            options.pop("use_cache")
        with torch.no_grad():
            return self.module(input_ids=ids.to(self.device), **options)

    @contextmanager
    def _written(self, writes: Sequence[Write | None], width: int) -> Iterator[None]:
        def change(row: int, write: Write, states: torch.Tensor) -> torch.Tensor:
            changed = states.clone()
            changed.view(len(writes), width, -1)[row, write.position] = write.state.to(changed)
            return changed

        with ExitStack() as stack:
            for row, write in enumerate(writes):
                if write is not None:
                    stack.enter_context(self._hook(write.place, partial(change, row, write)))
            yield

    def _hook(self, place: Place, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Pass the states at a place through a function; returns the handle of the hook."""
        block = self.module.get_submodule(self.architecture.blocks)[place.layer]
        part = self.architecture.part(place.site)
        module = block.get_submodule(part.path) if part else block

        def at_output(_module: Any, _args: Any, output: Any) -> Any:
            return with_states(output, change(_tensor(states_of(output))))

        def at_input(_module: Any, args: Any, kwargs: Any) -> Any:
            changed = change(_tensor(first_input(args, kwargs)))
            if args:
                return (changed, *args[1:]), kwargs
            return args, kwargs | {next(iter(kwargs)): changed}

        if place.site.end == "input":
            return module.register_forward_pre_hook(at_input, with_kwargs=True)
        return module.register_forward_hook(at_output)


def _tensor(states: Any) -> torch.Tensor:
    if not isinstance(states, torch.Tensor):
        raise TypeError(f"a module has a {type(states).__name__} instead of its states")
    return states


def distance(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest difference, in standard deviations of `scale`; infinite if a number is not finite.

    A logit of -inf excludes a token. Two of these are equal, and neither is part of the scale.
    """
    got, wanted = got.cpu().float(), wanted.cpu().float()
    difference = float((got - wanted).masked_fill(got == wanted, 0).abs().amax() / spread(scale))
    return min(float("inf"), difference)  # so a NaN is infinite


def spread(logits: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the finite logits; NaN if there are none."""
    finite = logits.isfinite()
    kept = (logits if finite.all() else logits[finite]).cpu().float()
    return (kept - kept.mean()).square().mean().sqrt()

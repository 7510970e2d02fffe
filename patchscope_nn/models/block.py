"""Learning from one token what a model's blocks return, how they attend, and what they cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from patchscope_nn.errors import ModelError


class BlockRun(NamedTuple):
    """What was observed while a token went through the first block.

    Attributes:
        output_type: The type of the block's output: `torch.Tensor`, or a `tuple` that starts with a tensor;
            None if it is neither, or if the model did not run, as some do not without their weights.
        attends: True if it calls PyTorch's `scaled_dot_product_attention` once, with the keys and values that
            it caches.
        kept: The number of values it caches for the token; 0 if it caches no keys and values.
        widths: The widths of first input and output, for each module inside the block with one state for the
            token at both; empty if the model did not run.
    """

    output_type: type | None
    attends: bool
    kept: int
    widths: Mapping[str, tuple[int, int]]


class _Done(Exception):  # noqa: N818 (not an error: it ends a forward once the block has run)
    """Raised by a hook."""


def run_block(module: Any, block: Any, *, device: Any, weightless: bool, name: str) -> BlockRun:
    """Run one token through a model's first block. If it is `weightless`, only shapes are computed.

    Raises:
        ModelError: The model does not run on token ids alone, or its blocks do not return a state per token.
    """
    import torch

    outputs: list[Any] = []
    widths: dict[str, tuple[int, int]] = {}
    attended: list[tuple[int, int]] = []

    def stop(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output)
        raise _Done

    problem: Exception | None = None
    with torch.no_grad(), block.register_forward_hook(stop):
        for options in _attempts(device, weightless=weightless):
            attended.clear()
            try:
                with _recording_attention(attended), _measuring(block, widths):
                    module(**options)
            except _Done:
                break
            except Exception as error:  # noqa: BLE001 (families raise any error; the next attempt needs less)
                problem = error
    if not outputs:
        if weightless or problem is None:
            return BlockRun(None, attends=False, kept=0, widths={})
        raise ModelError(
            f"{name!r} ({type(module).__name__}) does not run on the token ids of a text alone: "
            f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:200]}",
            hint="Use a causal language model.",
        ) from problem
    _check_states(outputs[0], module, name=name)
    layer = _kept(options.get("past_key_values"))
    same = layer is None or attended == [(layer.keys.shape[-1], layer.values.shape[-1])]
    return BlockRun(
        output_type=next((kind for kind in (torch.Tensor, tuple) if isinstance(outputs[0], kind)), None),
        attends=len(attended) == 1 and same,
        kept=0 if layer is None else layer.keys.numel() + layer.values.numel(),
        widths=widths,
    )


def _recording_attention(calls: list[tuple[int, int]]) -> Any:
    """While active, add the widths of keys and values of each `scaled_dot_product_attention` to `calls`."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Recording(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                calls.append((args[1].shape[-1], args[2].shape[-1]))
            return func(*args, **(kwargs or {}))

    return Recording()


@contextmanager
def _measuring(block: Any, widths: dict[str, tuple[int, int]]) -> Iterator[None]:
    """While active, add the widths of one token's states at the modules inside a block to `widths`."""

    def measure(path: str, _module: Any, args: Any, kwargs: Any, output: Any) -> None:
        width = _width(first_input(args, kwargs)), _width(states_of(output))
        if all(width):
            widths[path] = width

    with ExitStack() as stack:
        for path, part in block.named_modules():
            if path:
                stack.enter_context(part.register_forward_hook(partial(measure, path), with_kwargs=True))
        yield


def _attempts(device: Any, *, weightless: bool) -> Iterator[dict[str, Any]]:
    """Yield arguments of a forward over one token; the first ones show most about the block.

    Without weights a complete mask is passed, because transformers would read values to make one. Some
    families do not accept it, so the second attempt passes an ordinary mask.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.ones(1, 1, dtype=torch.long, device=device)
    whole = torch.zeros(1, 1, 1, 1, device=device)
    for mask in ({"attention_mask": whole}, {"attention_mask": ids}) if weightless else ({},):
        yield {"input_ids": ids, "past_key_values": DynamicCache(), "use_cache": True, **mask}
        yield {"input_ids": ids, "use_cache": False, **mask}


def _kept(cache: Any) -> Any:
    """Return the layer of a cache that holds the token's keys and values; None if there is none."""
    layers = getattr(cache, "layers", ())
    return next((layer for layer in layers if getattr(layer, "keys", None) is not None), None)


def states_of(output: Any) -> Any:
    """Return the states in a module's output: the output itself, or its first element."""
    return output[0] if isinstance(output, tuple | list) else output


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return nnsight's `input` of a module: its first positional argument, otherwise its first keyword's."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _width(states: Any) -> int:
    """Return the width of a single token's state, (1, 1, width) or (1, width); 0 for other shapes."""
    shape = tuple(getattr(states, "shape", ()))
    return shape[-1] if len(shape) in (2, 3) and {*shape[:-1]} == {1} else 0


def with_states(output: Any, states: Any) -> Any:
    """Replace the states in a module's output."""
    return type(output)((states, *output[1:])) if isinstance(output, tuple | list) else states


def _check_states(output: Any, module: Any, *, name: str) -> None:
    """Refuse blocks whose output for a token is not a single state of the model's width."""
    states = states_of(output)
    width = module.config.get_text_config().hidden_size
    shape = tuple(getattr(states, "shape", ()))
    if shape not in ((1, 1, width), (1, width)):
        what = f"states of shape {shape}" if shape else f"a {type(states).__name__}"
        raise ModelError(
            f"{name!r} ({type(module).__name__}): its blocks return {what} for one token; one state of size "
            f"{width} is expected. A layer's hidden state is not defined for a model that passes several "
            "streams, or something else, from block to block.",
            hint="Use a model with one residual stream.",
        )

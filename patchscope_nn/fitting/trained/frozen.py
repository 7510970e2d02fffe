"""A frozen model whose states are read and written by plain hooks, so that gradients pass through.

This is only for what needs a gradient. Fits read everything else through the compiler (`fitting/reading.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from patchscope_nn.errors import LayerError, ModelError
from patchscope_nn.models import TURN, Model
from patchscope_nn.models.architecture import check_unembed, input_device, is_weightless, unembed
from patchscope_nn.models.block import states_of, with_states
from patchscope_nn.spec.layers import EMBED, parse_layers, resolve_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Write:
    """States to write into a batch.

    Attributes:
        layer: The block whose output they replace; `EMBED` is the input of block 0.
        positions: (batch, n_patched) positions.
        states: (batch, n_patched, d_model), or (batch, 1, d_model) for one state at all positions of a row.
    """

    layer: int
    positions: Sequence[Sequence[int]]
    states: torch.Tensor

    def into(self, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream, (batch, position, d_model), with the states written into it."""
        columns = torch.tensor([list(row) for row in self.positions], device=residual.device)
        rows = torch.arange(len(columns), device=residual.device)[:, None]
        residual = residual.clone()
        residual[rows, columns] = self.states.to(residual).expand(*columns.shape, -1)
        return residual


class Frozen:
    """A frozen model whose states can be read, written and differentiated; made by `frozen`.

    Attributes:
        model: The model.
        last: The index of its last block.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.last = model.info.n_layers - 1
        self._blocks = model.module.get_submodule(model.info.architecture.blocks)
        self._keeps = model.info.supports("few_logits")

    @property
    def device(self) -> Any:
        """The device of its inputs, where the tensors of a map belong too."""
        return input_device(self.model.module)

    def batch(self, sequences: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Put sequences of token ids into one batch, padded on the right: the model's inputs."""
        self._check_batch(sequences)
        ids = [torch.tensor(list(sequence)) for sequence in sequences]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        return {"input_ids": padded.to(self.device), "attention_mask": mask.to(self.device)}

    def _check_batch(self, sequences: Sequence[Sequence[int]]) -> None:
        """Refuse a batch that the model's proof found to be computed wrongly."""
        verdict, lengths = self.model.info.verdict, [*map(len, sequences)]
        if verdict is None:
            return
        several = ""
        if len(lengths) > 1 and not verdict.batches:
            several = "several texts"
        elif len({*lengths}) > 1 and verdict.withholds("mixed_lengths", tokens=max(lengths)):
            several = "texts of different lengths"
        if several:
            raise ModelError(
                f"{self.model.info.name} is wrong where one pass reads {several}, as its proof found, and "
                "this kind of mapping is trained on such passes.",
                hint="Train it on texts of one length, or fit a mapping in closed form."
                if verdict.batches
                else "Fit a mapping in closed form.",
            )

    def unembed(self, states: torch.Tensor) -> torch.Tensor:
        """The logits the model makes of states of its last block, (..., d_model) -> (..., vocab_size)."""
        return unembed(self.model.module, self.model.info.architecture, states)

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        read: Collection[int],
        writes: Sequence[Write] = (),
        leaf: int | None = None,
    ) -> dict[int, torch.Tensor]:
        """Run the model once on a `batch`.

        Args:
            inputs: The batch.
            read: The layers whose states are returned; `EMBED` is the input of block 0.
            writes: What is written; a layer is read after it is written.
            leaf: The first layer for which a gradient is taken; earlier layers keep nothing for it.

        Returns:
            For each layer of `read`, (batch, position, d_model).
        """
        captured: dict[int, torch.Tensor] = {}

        def pass_on(layer: int, states: torch.Tensor) -> torch.Tensor:
            for write in writes:
                if write.layer == layer:
                    states = write.into(states)
            if layer == leaf:
                states = states.detach().requires_grad_()
            if layer in read:
                captured[layer] = states
            return states

        layers = {*read, *(write.layer for write in writes), *(() if leaf is None else (leaf,))}
        with ExitStack() as hooks:
            for layer in layers:
                hooks.callback(self._hook(layer, pass_on).remove)
            kept = {"logits_to_keep": 1} if self._keeps else {}
            self.model.module(**inputs, use_cache=False, **kept)
        return captured

    def _hook(self, layer: int, pass_on: Any) -> Any:
        if layer == EMBED:

            def before(_module: Any, args: Any, kwargs: Any) -> Any:
                if args:
                    return (pass_on(layer, args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": pass_on(layer, kwargs["hidden_states"])}

            return self._blocks[0].register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: Any, _args: Any, output: Any) -> Any:
            return with_states(output, pass_on(layer, states_of(output)))

        return self._blocks[layer].register_forward_hook(after)


def choose_layers(model: Model, layers: Any) -> tuple[int, ...]:
    """Resolve a layer selector: an int, `all`, `embed`, a range such as `0:10`, or a list of these.

    Raises:
        LayerError: The selector cannot be read, or names a layer outside the model.
    """
    try:
        selector = parse_layers(layers)
    except ValueError as error:
        raise LayerError(f"layer={layers!r} {error}.") from None
    return resolve_layers(selector, n_layers=model.info.n_layers, field="layer")


def check_weights(model: Model) -> None:
    """Raise a `ModelError` unless the weights of a model are in this process."""
    if is_weightless(model.module):
        raise ModelError(
            f"{model.info.name!r} has no weights in this process, and fitting needs them.",
            hint="Load the model here, without --remote and with the engine transformers; what is fitted can "
            "then be used anywhere.",
        )


@contextmanager
def frozen(model: Model) -> Iterator[Frozen]:
    """Freeze a model's weights, and restore it afterwards. Other threads wait meanwhile.

    Raises:
        ModelError: The weights are elsewhere, or what follows its last block is not known.
    """
    module = model.module
    check_weights(model)
    with TURN:
        check_unembed(module, model.info.architecture, name=model.info.name)
        learning = [weight for weight in module.parameters() if weight.requires_grad]
        training = module.training
        module.eval()
        try:
            for weight in learning:
                weight.requires_grad_(False)
            yield Frozen(model)
        finally:
            for weight in learning:
                weight.requires_grad_()
            module.train(training)

"""Descriptions of models, as the planner needs them; they hold no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from patchscope_nn._util.arguments import checked_class
from patchscope_nn.errors import ModelError
from patchscope_nn.models.verdict import Verdict
from patchscope_nn.spec.sites import ATTENTION, RESIDUAL, Site

#: Messages leave out numbered modules, for example the hundreds of experts of a mixture.
_NUMBERED = re.compile(r"\.\d+(\.|$)")
#: The device of a model whose weights are not in this process.
ELSEWHERE = "remote"
#: The names that families give to the argument of a block that holds the states.
STATES_ARGUMENTS = ("hidden_states", "x")
#: The names of the engines.
TRANSFORMERS, VLLM = "transformers", "vllm"


#: The features of a model that the planner and the checks use:
#: `cache`            a forward pass can continue from the keys and values of an earlier one
#: `causal`           a token of a prompt never attends to later tokens
#: `cut`              attention edges can be cut: blocks take a mask, and their attention without one is known
#: `few_logits`       a subset of the positions can be unembedded
#: `packing`          blocks can run one by one on segments of a sequence (see `plan/layout.py`)
#: `positions`        the forward takes the position of each token
#: `requests`         each prompt is a request to an engine that batches, decodes and caches by itself:
#:                    prompts cannot share a forward pass, and modules cannot be called or trained
#: `shared_attention` attention to a shared prefix can be computed separately
Feature: TypeAlias = Literal[
    "cache", "causal", "cut", "few_logits", "packing", "positions", "requests", "shared_attention"
]


class Part(NamedTuple):
    """A module inside a block: its dotted path there, and the widths of its first input and its output."""

    path: str
    takes: int
    gives: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a model keeps its parts, as dotted module paths.

    Attributes:
        blocks: The list of decoder blocks.
        parts: The modules inside the first block; the other blocks are assumed to be alike.
        final_norm: The norm between the last block and the unembedding; None if there is none.
        unembed: The linear map to the vocabulary.
        arguments: The arguments of the model's forward.
        block_arguments: The arguments of a block's forward, in order.
        windows: The size of each block's attention window in tokens; None for full attention. Empty if a
            block's attention is of another kind.
        packs: True if blocks can be run one by one on segments of a sequence (see `plan/layout.py`).
        gives_tuples: True if a block returns a tuple that starts with its states, False if only its states.
        attends: True if a block calls PyTorch's `scaled_dot_product_attention` once, with the keys and values
            that it caches.
        kept: The number of values a block caches for a token; 0 if that is not known.
        causal: True if a token of a prompt never attends to later tokens. If False, decoded tokens still
            attend only to earlier ones, since decoding continues token by token from the prompt's cache.
        stretches: True if its rotary factors change when it reads more tokens than its config names.
        requests: True if each prompt is a request to an engine (see `Feature`).
        terms: How many tensors at the start of a block's output add up to the residual stream.
    """

    blocks: str
    parts: tuple[Part, ...]
    final_norm: str | None
    unembed: str
    arguments: tuple[str, ...]
    block_arguments: tuple[str, ...] = ()
    windows: tuple[int | None, ...] = ()
    packs: bool = False
    gives_tuples: bool = False
    attends: bool = False
    kept: int = 0
    causal: bool = True
    stretches: bool = False
    requests: bool = False
    terms: int = 1

    def part(self, site: Site) -> Part | None:
        """Return the module of a site; None for the block itself, or if blocks do not have the module."""
        parts = {part.path: part for part in self.parts}
        return next((parts[path] for path in site.modules if path in parts), None)

    @property
    def states_argument(self) -> tuple[int, str]:
        """The argument of a block that holds its states: its index, and its name."""
        names = [name for name in self.block_arguments if name != "self"]
        return next(((index, name) for index, name in enumerate(names) if name in STATES_ARGUMENTS), (0, ""))

    @property
    def features(self) -> frozenset[Feature]:
        """The features that the model supports."""
        masks = self.part(ATTENTION) is not None and "attention_mask" in self.block_arguments
        known: dict[Feature, bool] = {
            "cache": self.requests or "past_key_values" in self.arguments,
            "causal": self.causal,
            "cut": masks and bool(self.windows) and self.causal,
            "few_logits": "logits_to_keep" in self.arguments,
            "packing": self.packs and self.causal,
            "positions": "position_ids" in self.arguments,
            "requests": self.requests,
            "shared_attention": self.attends,
        }
        return frozenset(name for name, there in known.items() if there)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model's parts, in numbers (not bytes), from which time and memory are estimated.

    Attributes:
        block_weights: The number of weights in a block's linear maps; each costs 2 FLOPs per token.
        unembed_weights: The number of weights in the unembedding; each costs 2 FLOPs per token.
        attention: The width of all attention heads together.
        cache: The number of values in the keys and values that a block caches for a token.
        widest: The width of the widest activation inside a block.
    """

    block_weights: int
    unembed_weights: int
    attention: int
    cache: int
    widest: int


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The description of a model.

    Attributes:
        name: The id, folder or `builtin:` name from which it was loaded.
        revision: The commit of a Hub model, if known.
        family: transformers' `model_type`.
        n_layers: The number of decoder blocks.
        d_model: The width of the residual stream.
        vocab_size: The number of logits.
        n_positions: The length of the longest prompt, in tokens; None if the config does not set a limit.
        dtype: The weights' dtype, for example `float32`.
        device: The device of the embedding; `remote` if the weights are not in this process.
        tied: True if embedding and unembedding share their weights.
        architecture: Where the parts are.
        sizes: The sizes of the parts.
        verdict: The result of the proof at load; None if the model was not proven.
        engine: The name of the engine that runs it.
        engine_args: The engine's own arguments, as JSON; empty if there are none.
        held_tokens: The number of tokens whose keys and values an engine of requests can hold; None for other
            engines, or if it is not known.
        held_block: An engine of requests holds the keys and values of a prompt in blocks of this many tokens.
    """

    name: str
    revision: str | None
    family: str
    n_layers: int
    d_model: int
    vocab_size: int
    n_positions: int | None
    dtype: str
    device: str
    tied: bool
    architecture: Architecture
    sizes: Sizes
    verdict: Verdict | None = None
    engine: str = TRANSFORMERS
    engine_args: str = ""
    held_tokens: int | None = None
    held_block: int = 1

    def supports(self, feature: Feature) -> bool:
        """True if the model supports a feature."""
        return feature in self.architecture.features

    @property
    def weights_here(self) -> bool:
        """True if the weights are in this process, and not on a server or in the processes of an engine."""
        return self.device != ELSEWHERE and not self.supports("requests")

    def lacks(self, site: Site) -> str | None:
        """Explain why the model does not have a site; None if it has it."""
        architecture = self.architecture
        if site.in_stream:
            return None
        if self.supports("requests") and site.end == "input":
            return f"{self.engine} gives the outputs of modules, and {site.name!r} is an input."
        if architecture.part(site) is not None:
            return None
        present = [part.path for part in architecture.parts if not _NUMBERED.search(part.path)]
        return (
            f"the blocks of {self.name} ({self.family}) have none of the modules "
            f"{', '.join(site.modules)}. They have {', '.join(present) or 'no modules'}."
        )

    def width(self, site: Site) -> int:
        """Return the size of the states at a site.

        Raises:
            ModelError: The model does not have the site.
        """
        if missing := self.lacks(site):
            raise ModelError(f"site {site.name!r}: {missing}", hint=f"Use {RESIDUAL.name}.")
        part = self.architecture.part(site)
        if part is None:
            return self.d_model
        return part.takes if site.end == "input" else part.gives

    @property
    def bytes_per_number(self) -> int:
        """The size of a number of its dtype, in bytes."""
        return 2 if self.dtype in ("bfloat16", "float16") else 4


@checked_class
@dataclass(frozen=True, kw_only=True)
class Model:
    """A model ready to be traced.

    Attributes:
        info: Its description.
        tokenizer: Its transformers tokenizer.
        traced: The `nnsight.TransformersModel`.
    """

    info: ModelInfo
    tokenizer: Any
    traced: Any

    @property
    def module(self) -> Any:
        """The transformers model that nnsight wraps."""
        return self.traced._module  # noqa: SLF001 (nnsight has no public attribute for it)


def same_vocabulary(first: Model, second: Model) -> bool:
    """True if two models have the same token ids, so that their distributions can be compared."""
    if first.tokenizer is second.tokenizer:
        return True
    return bool(first.tokenizer.get_vocab() == second.tokenizer.get_vocab())

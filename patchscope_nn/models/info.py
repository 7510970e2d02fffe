"""What planning needs to know of a model; nothing here holds a weight."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from patchscope_nn._util.arguments import checked_class
from patchscope_nn.errors import ModelError
from patchscope_nn.models.verdict import Verdict
from patchscope_nn.spec.sites import ATTENTION, RESIDUAL, Site

#: Modules that are numbered, such as the hundreds of experts of a mixture, are left out of messages.
_NUMBERED = re.compile(r"\.\d+(\.|$)")
#: The device of a model whose weights are not in this process.
ELSEWHERE = "remote"


#: What the planner and the checks may ask of a model:
#: `cache`            a forward pass can go on from the keys and values of an earlier one
#: `causal`           a token of a prompt never attends to those after it
#: `cut`              attention edges can be cut: blocks take a mask, and what they see without one is known
#: `few_logits`       only some positions can be unembedded
#: `packing`          blocks can run one by one on segments of a sequence (see `plan/layout.py`)
#: `positions`        it takes the position of each token
#: `shared_attention` attention to a shared prefix can be computed separately
Feature: TypeAlias = Literal[
    "cache", "causal", "cut", "few_logits", "packing", "positions", "shared_attention"
]


class Part(NamedTuple):
    """A module inside a block.

    Attributes:
        path: Its dotted path inside the block.
        takes: The width of its first input.
        gives: The width of its output.
    """

    path: str
    takes: int
    gives: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where a model keeps its parts, as dotted module paths.

    Attributes:
        blocks: The list of decoder blocks.
        parts: The modules inside the first block, which stands for all.
        final_norm: The norm between the last block and the unembedding; None where there is none.
        embed: The token embedding.
        unembed: The linear map to the vocabulary.
        arguments: The names the model's forward takes.
        block_arguments: The names a block's forward takes, in order.
        windows: For each block how many tokens back its attention sees; None for all. Empty where what blocks
            see is neither all nor a window.
        packs: Whether blocks can be run one by one on segments of a sequence (see `layout.py`).
        gives_tuples: Whether a block gives a tuple that starts with its states, and not the bare states.
        attends: Whether a block calls PyTorch's `scaled_dot_product_attention` once, with the keys and values
            that it keeps.
        kept: How many numbers a block keeps of a token in its cache; 0 where that is not known.
        causal: Whether a token of a prompt never sees those after it. Where it does, what is decoded still
            sees only what came before it: decoding goes on from the prompt's keys and values, token by token.
        stretches: Whether its rotary factors change once it has read more tokens than its config names.
    """

    blocks: str
    parts: tuple[Part, ...]
    final_norm: str | None
    embed: str
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

    def part(self, site: Site) -> Part | None:
        """The module that a site is at; None for the block itself, and where blocks have no such module."""
        parts = {part.path: part for part in self.parts}
        return next((parts[path] for path in site.modules if path in parts), None)

    @property
    def features(self) -> frozenset[Feature]:
        """What can be done with the model."""
        masks = self.part(ATTENTION) is not None and "attention_mask" in self.block_arguments
        known = {
            "cache": "past_key_values" in self.arguments,
            "causal": self.causal,
            "cut": masks and bool(self.windows) and self.causal,
            "few_logits": "logits_to_keep" in self.arguments,
            "packing": self.packs and self.causal,
            "positions": "position_ids" in self.arguments,
            "shared_attention": self.attends,
        }
        return frozenset(cast("Feature", name) for name, there in known.items() if there)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large a model's parts are, in numbers (not bytes): what a token costs, and what it takes to hold.

    Attributes:
        block_weights: The weights of a block's linear maps; 2 FLOPs each for a token.
        unembed_weights: The weights of the unembedding; the same.
        attention: The width of all attention heads together.
        cache: The keys and values a block keeps of a token.
        widest: The widest activation inside a block.
    """

    block_weights: int
    unembed_weights: int
    attention: int
    cache: int
    widest: int


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model, described.

    Attributes:
        name: The id, folder or `builtin:` name it was loaded by.
        revision: The commit of a Hub model, where known.
        family: transformers' `model_type`.
        n_layers: The number of decoder blocks.
        d_model: The width of the residual stream.
        vocab_size: The number of logits.
        n_positions: The longest prompt, in tokens; None where the config sets no limit.
        dtype: The weights' dtype, for example `float32`.
        device: The device of the embedding; `remote` where the weights are not in this process.
        tied: Whether embedding and unembedding share their weights.
        architecture: Where the parts are.
        sizes: How large they are.
        verdict: What the proof at load found out; None where the model was not proven.
        engine: The name of the engine that runs it.
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
    engine: str = "transformers"

    def supports(self, feature: Feature) -> bool:
        """Whether something can be done with the model."""
        return feature in self.architecture.features

    def lacks(self, site: Site) -> str | None:
        """Why the model does not have a site; None where it has it."""
        architecture = self.architecture
        if site.in_stream or architecture.part(site) is not None:
            return None
        there = [part.path for part in architecture.parts if not _NUMBERED.search(part.path)]
        return (
            f"the blocks of {self.name} ({self.family}) have no such module: none of "
            f"{', '.join(site.modules)}. They have {', '.join(there) or 'no modules'}."
        )

    def width(self, site: Site) -> int:
        """The size of the states at a site.

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
        """The size of one number of its dtype, in bytes."""
        return 2 if self.dtype in ("bfloat16", "float16") else 4


@checked_class
@dataclass(frozen=True, kw_only=True)
class Model:
    """A model ready to be traced.

    Attributes:
        info: What is known of it.
        tokenizer: Its transformers tokenizer.
        traced: The `nnsight.TransformersModel`.
    """

    info: ModelInfo
    tokenizer: Any
    traced: Any

    @property
    def module(self) -> Any:
        """The transformers model that nnsight wraps."""
        return self.traced._module  # noqa: SLF001 (nnsight has no public name for it)


def same_vocabulary(first: Model, second: Model) -> bool:
    """Whether two models number their tokens alike, so that their distributions can be compared."""
    if first.tokenizer is second.tokenizer:
        return True
    return bool(first.tokenizer.get_vocab() == second.tokenizer.get_vocab())

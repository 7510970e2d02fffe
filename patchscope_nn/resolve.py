"""Data rows resolved: prompts filled and tokenized, positions and layers counted out. Pure.

Each distinct prompt is tokenized once and known by its number from then on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from patchscope_nn.errors import InputError
from patchscope_nn.layers import LayerSelector, resolve_layers
from patchscope_nn.models import Model, ModelInfo, same_vocabulary
from patchscope_nn.positions import resolve_positions
from patchscope_nn.prompts import Encoded, PromptSpec, continuation_ids, encode, render
from patchscope_nn.spec import Choices, Generate, NextToken, Patchscope, Source, Target

Row = Mapping[str, Any]
#: The positions that are patched together, from the left.
Together = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ResolvedRow:
    """One data row: what it reads, what it writes, and what it is compared with.

    Attributes:
        source_prompt: S, a number.
        source_positions: i, one entry for each cell.
        target_prompt: T, a number.
        target_positions: i*, one entry for each cell; None where it is the source's own.
        reference_ids: Ids of the named reference tokens.
        choices: The texts of the choices.
        continuations: Their ids.
    """

    source_prompt: int
    source_positions: tuple[Together, ...]
    target_prompt: int
    target_positions: tuple[Together, ...] | None
    reference_ids: tuple[int, ...]
    choices: tuple[str, ...]
    continuations: tuple[tuple[int, ...], ...]


class Prompts:
    """The distinct prompts of one side, numbered as they come."""

    def __init__(self, side: str, model: Model, *, more: int) -> None:
        self.side, self.model, self.more = side, model, more
        self.encoded: list[Encoded] = []
        self.digests: list[str] = []
        self._numbers: dict[PromptSpec, int] = {}

    def number(self, prompt: PromptSpec) -> int:
        """The number of a prompt, tokenizing it at its first coming."""
        if prompt not in self._numbers:
            encoded = encode(prompt, self.model.tokenizer, field=f"{self.side}.prompt")
            self.check_length(encoded, more=self.more, of="to generate")
            self._numbers[prompt] = len(self.encoded)
            self.encoded.append(encoded)
            self.digests.append(hashlib.sha256(repr(encoded.ids).encode()).hexdigest())
        return self._numbers[prompt]

    def check_length(self, encoded: Encoded, *, more: int, of: str) -> None:
        """Refuse a prompt that, with the tokens that come after it, is longer than the model reads."""
        info = self.model.info
        if info.n_positions is not None and len(encoded.ids) + more > info.n_positions:
            raise InputError(
                f"{self.side}.prompt has {len(encoded.ids)} tokens"
                f"{f' and {more} more {of}' * bool(more)}; {info.name} reads at most {info.n_positions}.",
                hint="Shorten the prompt.",
            )


class Resolver:
    """Resolves the data rows of one Patchscope, one after the other.

    Attributes:
        layers: l, the same for every row.
        target_layers: l*, or None for `same`.
        compares: Whether the source's own next-token distribution is to be read.
        sources: The distinct S.
        targets: The distinct T.
    """

    def __init__(self, scope: Patchscope, source: Model, target: Model) -> None:
        _check_site("source", scope.source, source.info)
        _check_site("target", scope.target, target.info)
        if scope.target.layer == "same" and scope.target.site != "residual" and _embeds(scope.source.layer):
            raise InputError(
                f"target.layer='same' writes at 'embed', the input of block 0, which has no "
                f"{scope.target.site}.",
                hint="Leave 'embed' out of source.layer, or use target.site: residual.",
            )
        self.scope, self.target = scope, target
        readout = scope.readout
        more = readout.max_new_tokens if isinstance(readout, Generate) else 0
        self.sources = Prompts("source", source, more=0)
        self.targets = Prompts("target", target, more=more)
        self.compares = isinstance(readout, NextToken) and _compares(readout, source, target)
        self.layers = resolve_layers(scope.source.layer, n_layers=source.info.n_layers, field="source.layer")
        self.target_layers = (
            None
            if scope.target.layer == "same"
            else resolve_layers(scope.target.layer, n_layers=target.info.n_layers, field="target.layer")
        )

    def resolve(self, row: Row) -> ResolvedRow:
        """Resolve one data row.

        Args:
            row: Column names and values.

        Returns:
            The row, resolved.

        Raises:
            InputError: A prompt, position, reference or choice does not resolve.
        """
        scope, readout = self.scope, self.scope.readout
        source = render(scope.source.prompt, row, field="source.prompt")
        source_number = self.sources.number(source)
        given = scope.target.prompt
        target = source if given is None else render(given, row, field="target.prompt")
        target_number = self.targets.number(target)
        read, written = self.sources.encoded[source_number], self.targets.encoded[target_number]
        choices = tuple(_texts(readout, row))
        ids = tuple(
            continuation_ids(written, text, self.target.tokenizer, field=f"readout.{readout.name}")
            for text in choices
        )
        if isinstance(readout, Choices):
            self.targets.check_length(written, more=max(map(len, ids)), of="of readout.choices")
        named = isinstance(readout, NextToken)
        return ResolvedRow(
            source_prompt=source_number,
            source_positions=resolve_positions(scope.source.position, read, field="source.position"),
            target_prompt=target_number,
            target_positions=self._target_positions(written),
            reference_ids=tuple(first for first, *_ in ids) if named else (),
            choices=() if named else choices,
            continuations=() if named else ids,
        )

    def _target_positions(self, written: Encoded) -> tuple[Together, ...] | None:
        target = self.scope.target
        if target.position is None and target.prompt is None:
            return None
        position = -1 if target.position is None else target.position
        return resolve_positions(position, written, field="target.position")


def _texts(readout: Any, row: Row) -> Iterator[str]:
    """The named reference tokens or choices of a row."""
    texts: tuple[str, ...] = ()
    if isinstance(readout, NextToken) and isinstance(readout.reference, tuple):
        texts = readout.reference
    if isinstance(readout, Choices):
        texts = readout.continuations
    return (str(render(text, row, field=f"readout.{readout.name}")) for text in texts)


def _compares(readout: NextToken, source: Model, target: Model) -> bool:
    if readout.reference is None:
        return False
    comparable = same_vocabulary(source, target)
    if readout.reference == "source" and not comparable:
        raise InputError(
            f"readout.next_token.reference: source compares the next tokens of {source.info.name} and "
            f"{target.info.name}, whose tokenizers number them differently.",
            hint="Name the reference tokens as texts, or use models with one tokenizer.",
        )
    return comparable


def _check_site(name: str, side: Source | Target, info: ModelInfo) -> None:
    if side.site == "residual":
        return
    if getattr(info.architecture, side.site) is None:
        raise InputError(
            f"{name}.site={side.site!r}: the blocks of {info.name} ({info.family}) have no such module.",
            hint="Use site: residual.",
        )
    if _embeds(side.layer):
        raise InputError(
            f"{name}.layer='embed' is the input of block 0, which has no {side.site}.",
            hint=f"Leave 'embed' out, or use {name}.site: residual.",
        )


def _embeds(layer: LayerSelector) -> bool:
    return "embed" in (layer if isinstance(layer, tuple) else (layer,))

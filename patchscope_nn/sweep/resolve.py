"""Resolves data rows: fills and tokenizes their prompts, and finds their positions and layers. Pure.

Each distinct prompt is tokenized once, and referred to by its number from then on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from patchscope_nn.errors import InputError
from patchscope_nn.models import Model
from patchscope_nn.spec import RESIDUAL, SITES, Patchscope, Readout, Vector
from patchscope_nn.spec.encoding import Encoded, continuation_ids, encode
from patchscope_nn.spec.layers import resolve_layers
from patchscope_nn.spec.positions import fill, resolve_positions
from patchscope_nn.spec.prompts import PER_LAYER, PromptSpec, placeholders, render
from patchscope_nn.sweep.checks import (
    check_engine,
    check_site,
    check_text_only,
    check_write,
    compares,
    embeds,
)
from patchscope_nn.sweep.entry import Entry, PositionSet, Row, Source, Term, VectorAt, prompt_of


class Prompts:
    """The distinct prompts of one side, numbered in the order in which they are met.

    Args:
        side: `source` or `target`, for messages.
        model: The model that reads them.
        more: How many tokens the readout appends to a prompt at most.
    """

    def __init__(self, side: str, model: Model, *, more: int) -> None:
        self.side, self.model, self.more = side, model, more
        self.encoded: list[Encoded] = []
        self.digests: list[str] = []
        self._numbers: dict[PromptSpec, int] = {}
        self._specs: list[PromptSpec] = []

    def number(self, prompt: PromptSpec) -> int:
        """Return the number of a prompt, and tokenize it if it is new."""
        if prompt not in self._numbers:
            encoded = encode(prompt, self.model.tokenizer, field=f"{self.side}.prompt")
            self.check_length(encoded, more=self.more, of="to generate")
            self._numbers[prompt] = len(self.encoded)
            self._specs.append(prompt)
            self.encoded.append(encoded)
            self.digests.append(hashlib.sha256(repr(encoded.ids).encode()).hexdigest())
        return self._numbers[prompt]

    def spliced(self, number: int, positions: PositionSet, text: str) -> int:
        """Return the number of a copy of a prompt in which a text replaces some of its tokens."""
        whole = self.encoded[number]
        first, last = min(positions), max(positions)
        start, end = whole.spans[first][0], whole.spans[last][1]
        # Whitespace at the start of the first token stays.
        start += len(whole.text[start:end]) - len(whole.text[start:end].lstrip())
        spec = self._specs[number]
        if isinstance(spec, str):
            return self.number(whole.text[:start] + text + whole.text[end:])
        ids = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.number((*whole.ids[:first], *ids, *whole.ids[last + 1 :]))

    def check_length(self, encoded: Encoded, *, more: int, of: str) -> None:
        """Check that a prompt, with `more` tokens after it, is not longer than the model can read."""
        info = self.model.info
        if info.n_positions is not None and len(encoded.ids) + more > info.n_positions:
            # transformers keeps the scaling factors of the longest prompt so far for all later prompts.
            dynamic = (
                ": the model could read more, but its dynamic rotary embedding then depends on the prompts "
                "that it has read before"
            )
            raise InputError(
                f"{self.side}.prompt has {len(encoded.ids)} tokens"
                f"{f' and {more} more {of}' * bool(more)}; {info.name} reads at most {info.n_positions}.",
                hint=f"Shorten the prompt{dynamic * info.architecture.stretches}.",
            )


class Resolver:
    """Resolves the data rows of one Patchscope.

    Attributes:
        layers: Every l, the same for all rows: the blocks whose output is read, or `EMBED`. If no state is
            written and l* is given, this is l*.
        target_layers: Every l*; None for `same`.
        shift, target_shift: The offsets of the source's and the target's site: a site `before` block n is the
            output of block n - 1.
        compares: Whether cells are compared with the source's own next-token distribution.
        sources: The distinct S.
        targets: The distinct T.
        vectors: The distinct vectors.
    """

    def __init__(self, scope: Patchscope, source: Model, target: Model, *, text_only: bool = False) -> None:
        check_site("source", scope.source, source.info)
        check_site("target", scope.target, target.info)
        read_site, written_site = (SITES[side.site] for side in (scope.source, scope.target))
        if scope.target.layer == "same" and not written_site.embeds and embeds(scope.source.layer):
            raise InputError(
                f"target.layer='same' writes at 'embed', the input of block 0, which has no "
                f"{scope.target.site}.",
                hint=f"Leave 'embed' out of source.layer, or use target.site: {RESIDUAL.name}.",
            )
        check_write(scope, target.info)
        check_engine(scope.readout, target.info)
        self.scope, self.target, self.text_only = scope, target, text_only
        self.sources = Prompts("source", source, more=0)
        self.targets = Prompts("target", target, more=scope.readout.decoded)
        self.vectors: dict[VectorAt, None] = {}
        self.compares = compares(scope, source, target)
        self.shift, self.target_shift = read_site.offset, written_site.offset
        if not scope.target.needs_state:
            self.shift = self.target_shift
        layers = resolve_layers(scope.source.layer, n_layers=source.info.n_layers, field="source.layer")
        self.layers = tuple(layer - self.shift for layer in layers)
        self.target_layers = None
        if scope.target.layer != "same":
            written = resolve_layers(scope.target.layer, n_layers=target.info.n_layers, field="target.layer")
            self.target_layers = tuple(layer - self.target_shift for layer in written)
            if not scope.target.needs_state:
                self.layers = self.target_layers
        if text_only:
            check_text_only(scope)

    def resolve(self, row: Row, number: int = 0) -> list[Entry]:
        """Resolve one data row.

        Args:
            row: Column names and values.
            number: The number of the row.

        Returns:
            The entries of the row.

        Raises:
            InputError: A prompt, position, reference or choice does not resolve.
        """
        scope = self.scope
        source, positions, terms = self._source(row)
        entries = []
        for prompt in scope.target.prompts or (scope.target.prompt,):
            layered = prompt is not None and PER_LAYER in placeholders(prompt)
            for index in range(len(self.layers)) if layered else (None,):
                layer_column = {} if index is None else {PER_LAYER: self.layers[index] + self.shift}
                target = self._target(prompt, {**row, **layer_column})
                entry = self._entry(row, number, target)
                entries.append(
                    replace(entry, source=source, source_positions=positions, terms=terms, layer=index)
                )
            if self.text_only:
                entries += self._text_only(row, entries[-1])
        return entries

    def _source(self, row: Row) -> tuple[Source, tuple[PositionSet, ...], tuple[Term, ...]]:
        """Return S, every i, and the states that are subtracted (`source.minus`)."""
        source = self.scope.source
        if source.vector is not None:
            return self._vector(source.vector, row), ((0,),), ()
        number = self.sources.number(render(_required(source.prompt), row, field="source.prompt"))
        selector = fill(source.position, row, field="source.position")
        positions = resolve_positions(selector, self.sources.encoded[number], field="source.position")
        if source.minus is None:
            return number, positions, ()
        minus = self.sources.number(render(source.minus, row, field="source.minus"))
        subtracted = resolve_positions(selector, self.sources.encoded[minus], field="source.minus")
        averaged = source.mean == "positions"
        if len(subtracted) != len(positions) or (
            not averaged and list(map(len, subtracted)) != list(map(len, positions))
        ):
            raise InputError(
                f"source.position names {len(positions)} positions of source.prompt and {len(subtracted)} of "
                "source.minus, or spans of different lengths.",
                hint="Name one position that both have, or use mean: positions.",
            )
        return number, positions, (Term(minus, subtracted, -1.0),)

    def _vector(self, vector: Vector, row: Row) -> VectorAt:
        index = vector.index
        if isinstance(index, str):
            text = str(render(index, row, field="source.vector.index"))
            if not text.removeprefix("-").isdecimal():
                raise InputError(
                    f"source.vector.index: {text!r} is not a whole number.",
                    hint="Give the number of a row of the file's matrix, or a column that holds one.",
                )
            index = int(text)
        at = VectorAt(vector.file, vector.key, index)
        self.vectors[at] = None
        return at

    def _target(self, prompt: PromptSpec | None, row: Row) -> int:
        """Return the number of T; without a target prompt, T is S."""
        if prompt is None:
            prompt = _required(self.scope.source.prompt)
            return self.targets.number(render(prompt, row, field="source.prompt"))
        return self.targets.number(render(prompt, row, field="target.prompt"))

    def _entry(self, row: Row, number: int, target: int, *, text_only: bool = False) -> Entry:
        """Make an entry without its source. With `text_only`, nothing is written: only the readout is set."""
        readout, written = self.scope.readout, self.targets.encoded[target]
        texts = tuple(_texts(readout, row))
        ids = tuple(
            continuation_ids(written, text, self.target.tokenizer, field=f"readout.{readout.name}")
            for text in texts
        )
        appended = ids if readout.appends else ()
        if appended:
            self.targets.check_length(written, more=max(map(len, appended)), of=f"of readout.{readout.name}")
        target_scope = self.scope.target
        corrupt, cut = (None, None) if text_only else (target_scope.corrupt, target_scope.cut)
        return Entry(
            row=number,
            source=0,
            source_positions=(),
            target_prompt=target,
            target_positions=() if text_only else self._target_positions(written, row),
            corrupted=_tokens(corrupt.position, written, row, "corrupt") if corrupt else (),
            unseen=_tokens(cut.position, written, row, "write.cut") if cut else (),
            reference_ids=() if appended else tuple(first for first, *_ in ids),
            choices=texts if appended else (),
            continuations=appended,
        )

    def _target_positions(self, written: Encoded, row: Row) -> tuple[PositionSet, ...] | None:
        target = self.scope.target
        if target.position is None and target.prompt is None and not target.prompts:
            return None
        position = -1 if target.position is None else target.position
        selector = fill(position, row, field="target.position")
        return resolve_positions(selector, written, field="target.position")

    def _text_only(self, row: Row, entry: Entry) -> Iterator[Entry]:
        """Yield an entry for every (i, i*), in whose T the source's text up to i replaces i*.

        If T is S, T stays as it is.
        """
        read = self.sources.encoded[prompt_of(entry.source)]
        own = self.scope.target.prompt is None and not self.scope.target.prompts
        for positions in entry.source_positions:
            for written in entry.target_positions or (positions,):
                prompt, last = entry.target_prompt, written
                if not own:
                    text = read.text[: read.spans[positions[-1]][1]]
                    prompt = self.targets.spliced(prompt, written, text)
                    last = (len(self.targets.encoded[prompt].ids) - 1,)
                yield replace(
                    self._entry(row, entry.row, prompt, text_only=True),
                    source=entry.source,
                    source_positions=(positions,),
                    target_positions=(last,),
                    text_only=True,
                )


def _required(prompt: PromptSpec | None) -> PromptSpec:
    if prompt is None:  # Source has checked this
        raise ValueError("a source without a vector should have a prompt")
    return prompt


def _tokens(position: Any, written: Encoded, row: Row, field: str) -> PositionSet:
    """Resolve a selector, after filling in the columns it names, to single tokens."""
    name = f"target.{field}.position"
    sets = resolve_positions(fill(position, row, field=name), written, field=name)
    return tuple(dict.fromkeys(token for positions in sets for token in positions))


def _texts(readout: Readout, row: Row) -> Iterator[str]:
    """Yield the readout's texts, filled in from a row."""
    return (str(render(text, row, field=f"readout.{readout.name}")) for text in readout.texts)

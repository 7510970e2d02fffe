"""Data rows resolved: prompts filled and tokenized, positions and layers counted out. Pure.

Each distinct prompt is tokenized once and known by its number from then on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from patchscope_nn.errors import InputError
from patchscope_nn.models import Model
from patchscope_nn.spec import RESIDUAL, SITES, Patchscope, Readout, Vector
from patchscope_nn.spec.layers import resolve_layers
from patchscope_nn.spec.positions import fill, resolve_positions
from patchscope_nn.spec.prompts import (
    PER_LAYER,
    Encoded,
    PromptSpec,
    continuation_ids,
    encode,
    placeholders,
    render,
)
from patchscope_nn.sweep.checks import check_site, check_text_only, check_write, compares, embeds
from patchscope_nn.sweep.entry import Entry, Row, Source, Term, Together, VectorAt, prompt_of


class Prompts:
    """The distinct prompts of one side, numbered as they come."""

    def __init__(self, side: str, model: Model, *, more: int) -> None:
        self.side, self.model, self.more = side, model, more
        self.encoded: list[Encoded] = []
        self.digests: list[str] = []
        self._numbers: dict[PromptSpec, int] = {}
        self._specs: list[PromptSpec] = []

    def number(self, prompt: PromptSpec) -> int:
        """The number of a prompt, tokenizing it at its first coming."""
        if prompt not in self._numbers:
            encoded = encode(prompt, self.model.tokenizer, field=f"{self.side}.prompt")
            self.check_length(encoded, more=self.more, of="to generate")
            self._numbers[prompt] = len(self.encoded)
            self._specs.append(prompt)
            self.encoded.append(encoded)
            self.digests.append(hashlib.sha256(repr(encoded.ids).encode()).hexdigest())
        return self._numbers[prompt]

    def spliced(self, number: int, positions: Together, text: str) -> int:
        """The number of a prompt in which a text stands in the place of some of its tokens."""
        whole = self.encoded[number]
        first, last = min(positions), max(positions)
        start, end = whole.spans[first][0], whole.spans[last][1]
        # What a token begins with before its word (a space, a line end) stays.
        start += len(whole.text[start:end]) - len(whole.text[start:end].lstrip())
        spec = self._specs[number]
        if isinstance(spec, str):
            return self.number(whole.text[:start] + text + whole.text[end:])
        ids = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.number((*whole.ids[:first], *ids, *whole.ids[last + 1 :]))

    def check_length(self, encoded: Encoded, *, more: int, of: str) -> None:
        """Refuse a prompt that, with the tokens that come after it, is longer than the model reads."""
        info = self.model.info
        if info.n_positions is not None and len(encoded.ids) + more > info.n_positions:
            # transformers keeps the factors of the longest prompt so far for those that are read next.
            dynamic = (
                ": the model could read on, but its dynamic rotary embedding then depends on the prompts "
                "that it read before"
            )
            raise InputError(
                f"{self.side}.prompt has {len(encoded.ids)} tokens"
                f"{f' and {more} more {of}' * bool(more)}; {info.name} reads at most {info.n_positions}.",
                hint=f"Shorten the prompt{dynamic * info.architecture.stretches}.",
            )


class Resolver:
    """Resolves the data rows of one Patchscope, one after the other.

    Attributes:
        layers: l, the same for every row: blocks whose output is read, or `EMBED`; where no state is written,
            l*, if that is given.
        target_layers: l*, or None for `same`.
        shift, target_shift: How many blocks below l and l* the blocks are whose output is meant, as their
            sites say.
        compares: Whether the source's own next-token distribution is to be read.
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
            number: The row's.

        Returns:
            Its entries.

        Raises:
            InputError: A prompt, position, reference or choice does not resolve.
        """
        scope = self.scope
        source, positions, terms = self._source(row)
        given = scope.target.prompts or (scope.target.prompt,)
        entries = []
        for prompt in given:
            layered = prompt is not None and PER_LAYER in placeholders(prompt)
            for place in range(len(self.layers)) if layered else (None,):
                named = {} if place is None else {PER_LAYER: self.layers[place] + self.shift}
                target = self._target(prompt, {**row, **named})
                entry = self._entry(row, number, target)
                entries.append(
                    replace(
                        entry,
                        source=source,
                        source_positions=positions,
                        terms=terms,
                        layer=place,
                    )
                )
            if self.text_only:
                entries += self._bare(row, entries[-1])
        return entries

    def _source(self, row: Row) -> tuple[Source, tuple[Together, ...], tuple[Term, ...]]:
        """S, i, and what is taken off."""
        source = self.scope.source
        if source.vector is not None:
            return self._vector(source.vector, row), ((0,),), ()
        given = _required(source.prompt)
        number = self.sources.number(render(given, row, field="source.prompt"))
        read = self.sources.encoded[number]
        asked = fill(source.position, row, field="source.position")
        positions = resolve_positions(asked, read, field="source.position")
        if source.minus is None:
            return number, positions, ()
        other = self.sources.number(render(source.minus, row, field="source.minus"))
        taken = resolve_positions(asked, self.sources.encoded[other], field="source.minus")
        averaged = source.mean == "positions"
        if len(taken) != len(positions) or (
            not averaged and list(map(len, taken)) != list(map(len, positions))
        ):
            raise InputError(
                f"source.position names {len(positions)} positions of source.prompt and {len(taken)} of "
                "source.minus, or spans of other lengths.",
                hint="Name one position that both have, or use mean: positions.",
            )
        return number, positions, (Term(other, taken, -1.0),)

    def _vector(self, vector: Vector, row: Row) -> VectorAt:
        index = vector.index
        if isinstance(index, str):
            said = str(render(index, row, field="source.vector.index"))
            if not said.removeprefix("-").isdecimal():
                raise InputError(
                    f"source.vector.index: {said!r} is no whole number.",
                    hint="Give the number of a row of the file's matrix, or a column that holds one.",
                )
            index = int(said)
        at = VectorAt(vector.file, vector.key, index)
        self.vectors[at] = None
        return at

    def _target(self, prompt: PromptSpec | None, row: Row) -> int:
        """T."""
        if prompt is None:
            prompt = _required(self.scope.source.prompt)
            return self.targets.number(render(prompt, row, field="source.prompt"))
        return self.targets.number(render(prompt, row, field="target.prompt"))

    def _entry(self, row: Row, number: int, target: int, *, bare: bool = False) -> Entry:
        """All but the source; of a bare prompt, in which nothing is written, what it is compared with."""
        readout, written = self.scope.readout, self.targets.encoded[target]
        texts = tuple(_texts(readout, row))
        ids = tuple(
            continuation_ids(written, text, self.target.tokenizer, field=f"readout.{readout.name}")
            for text in texts
        )
        appended = ids if readout.appends else ()
        if appended:
            self.targets.check_length(written, more=max(map(len, appended)), of=f"of readout.{readout.name}")
        corrupt, cut = self.scope.target.corrupt, self.scope.target.cut
        return Entry(
            row=number,
            source=0,
            source_positions=(),
            target_prompt=target,
            target_positions=() if bare else self._target_positions(written, row),
            corrupted=_tokens(corrupt.position, written, row, "corrupt") if corrupt and not bare else (),
            unseen=_tokens(cut.position, written, row, "write.cut") if cut and not bare else (),
            reference_ids=() if appended else tuple(first for first, *_ in ids),
            choices=texts if appended else (),
            continuations=appended,
        )

    def _target_positions(self, written: Encoded, row: Row) -> tuple[Together, ...] | None:
        target = self.scope.target
        if target.position is None and target.prompt is None and not target.prompts:
            return None
        position = -1 if target.position is None else target.position
        asked = fill(position, row, field="target.position")
        return resolve_positions(asked, written, field="target.position")

    def _bare(self, row: Row, entry: Entry) -> Iterator[Entry]:
        """For every (i, i*): T with the source's text, up to i, in place of i*; where T = S, T as it is."""
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
                    self._entry(row, entry.row, prompt, bare=True),
                    source=entry.source,
                    source_positions=(positions,),
                    target_positions=(last,),
                    text_only=True,
                )


def _required(prompt: PromptSpec | None) -> PromptSpec:
    if prompt is None:  # Source and Patchscope let nothing else through
        raise ValueError("a source without a vector has a prompt")
    return prompt


def _tokens(position: Any, written: Encoded, row: Row, field: str) -> Together:
    """The tokens a selector names, whose texts may name columns."""
    name = f"target.{field}.position"
    found = resolve_positions(fill(position, row, field=name), written, field=name)
    return tuple(dict.fromkeys(at for together in found for at in together))


def _texts(readout: Readout, row: Row) -> Iterator[str]:
    """The readout's texts, filled by a row."""
    return (str(render(text, row, field=f"readout.{readout.name}")) for text in readout.texts)

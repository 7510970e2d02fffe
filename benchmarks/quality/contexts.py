"""Held-out contexts: texts of a file, each cut after a random token (section 4.1: by trimming the input).

A file is read as WikiText lays it out: one paragraph a line, tokens set apart by spaces, rare words as <unk>.
Passages with <unk> are left out, and the spaces and @-@ taken back, so that a model sees ordinary text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from patchscope_nn.models import Model

SEED = 0
#: A passage has as many words or more; a context as many tokens. Position 0 is an attention sink, and the few
#: tokens after it say little.
WORDS, LEAST, MOST = 30, 5, 80


def passages(file: Path) -> list[str]:
    """Sentences in a row without <unk>, from paragraphs of a WikiText file."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        paragraph = line.strip()
        if paragraph and not paragraph.startswith("="):
            found += [plain for run in _known(paragraph) if len((plain := _plain(run)).split()) >= WORDS]
    return found


def _known(paragraph: str) -> Iterator[str]:
    run: list[str] = []
    for sentence in [*re.split(r"(?<= [.!?]) ", paragraph), "<unk>"]:
        if "<unk>" not in sentence:
            run.append(sentence)
        elif run:
            yield " ".join(run)
            run = []


def _plain(text: str) -> str:
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r" ([,.;:!?)\]'%])", r"\1", text)
    return re.sub(r"([(\[$£]) ", r"\1", text).strip()


def contexts(file: Path, *, model: Model, count: int) -> list[dict[str, str]]:
    """Rows of a column `context`, one a passage, that end at a random token of the model.

    Args:
        file: A WikiText file.
        model: Whose tokens are counted.
        count: How many; the same seed gives the same ones.

    Returns:
        (count,) rows.

    Raises:
        ValueError: The file has fewer passages.
    """
    chooser = random.Random(SEED)  # noqa: S311 (a seeded choice, no secret)
    texts = passages(file)
    chooser.shuffle(texts)
    rows: list[dict[str, str]] = []
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        kept = ids[: chooser.randint(LEAST, min(MOST, len(ids) - 1))]
        context = model.tokenizer.decode(kept, skip_special_tokens=True)
        # A cut inside a character, or one the tokenizer would join otherwise, is no context of these tokens.
        if model.tokenizer(context)["input_ids"] == kept:
            rows.append({"context": context})
        if len(rows) == count:
            return rows
    raise ValueError(
        f"{file.name} has {len(rows)} passages of {WORDS} words without <unk>; asked for {count}."
    )

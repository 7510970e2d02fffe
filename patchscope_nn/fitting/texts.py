"""The texts of a fit: read, made distinct, and dealt out: to fit on, to choose by, to hold out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.errors import DataError

#: What is fitted on where nothing is named, and the column of it.
DEFAULT_DATA: Mapping[str, Any] = {"builtin": "texts"}
DEFAULT_COLUMN = "text"
_COLUMN = "text"
#: The share of the texts that are not held out on which settings (lambda, alpha) are chosen.
_CHOOSING = 0.1


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts, dealt out: no text stands in two parts.

    Attributes:
        fitted: What is fitted on first.
        choosing: What lambda or alpha is chosen by; afterwards it is fitted on, too.
        held_out: What the reported numbers are measured on, and nothing else.
        about: Where they come from, for the provenance.
    """

    fitted: tuple[str, ...]
    choosing: tuple[str, ...]
    held_out: tuple[str, ...]
    about: Mapping[str, Any]


def read_texts(
    data: DataSpec,
    *,
    column: str | None = None,
    held_out: float | DataSpec = 0.2,
    limit: int | None = None,
    seed: int = 0,
    base: Path | None = None,
) -> Texts:
    """Read texts and deal them out.

    Which part a text falls in is decided by a digest of the text and the seed: the order of the data, and
    texts that are there twice, make no difference.

    Args:
        data: Where the texts come from.
        column: The column that holds them; None is the only one with texts, or `text`.
        held_out: The share of the texts that is held out; or data of its own, all of it held out.
        limit: The most rows to read, of each data.
        seed: Decides which texts are held out.
        base: The folder that relative files start from.

    Returns:
        The texts.

    Raises:
        DataError: The data cannot be read, has no such column, or is too little; or what is to be held out is
            what is fitted on.
    """
    if isinstance(held_out, DataSpec) and held_out == data:
        raise DataError(
            f"held_out names the same data as is fitted on, {_named(data)}.",
            hint="A fit says nothing on its own data. Name other data, or a share of it, for example 0.2.",
        )
    known = _distinct(data, column=column, limit=limit, base=base)
    if isinstance(held_out, DataSpec):
        apart = _distinct(held_out, column=column, limit=limit, base=base)
        rest = _order(known, seed)
        held = [text for key, text in apart.items() if key not in known]
        if not held:
            raise DataError(
                f"every text of held_out, {_named(held_out)}, is among those that are fitted on.",
                hint="A fit says nothing on its own data. Hold other texts out.",
            )
        dropped = len(apart) - len(held)
    else:
        if not 0 < held_out < 1:
            raise DataError(
                f"held_out={held_out} is no share of the texts.",
                hint="Give one above 0 and below 1, or data.",
            )
        mixed, dropped = _order(known, seed), 0
        count = max(1, round(held_out * len(mixed)))
        held, rest = mixed[:count], mixed[count:]
    chosen = max(1, round(_CHOOSING * len(rest)))
    if len(rest) <= chosen:
        raise DataError(
            f"{_named(data)} has {len(known)} different texts; a fit needs 3: to fit on, to choose its "
            "settings by, and to hold out.",
            hint="Give some hundreds or more.",
        )
    return Texts(
        fitted=tuple(rest[chosen:]),
        choosing=tuple(rest[:chosen]),
        held_out=tuple(held),
        about={
            "fitted_on": {"data": _dumped(data), "n_texts": len(rest), "digest": digest_of(rest)},
            "held_out": {
                "data": _dumped(held_out if isinstance(held_out, DataSpec) else data),
                "n_texts": len(held),
                "digest": digest_of(held),
                "dropped": dropped,
            },
        },
    )


def digest_of(texts: Iterable[str]) -> str:
    """16 hex digits that tell sets of texts apart; their order makes no difference."""
    keys = sorted(_key(text) for text in texts)
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


def _distinct(data: DataSpec, *, column: str | None, limit: int | None, base: Path | None) -> dict[str, str]:
    rows = load_rows(data, base=base, limit=limit)
    name = column or _column(rows, data)
    if name not in rows[0]:
        raise DataError(
            f"{_named(data)} has no column {name!r}; it has {', '.join(rows[0])}.",
            hint="Name the column of the texts (--column).",
        )
    texts = (row[name] for row in rows)
    found: dict[str, str] = {}
    for text in texts:
        if isinstance(text, str) and text.strip():
            found.setdefault(_key(text), text)
    if not found:
        raise DataError(
            f"column {name!r} of {_named(data)} holds no text.", hint="Name another column (--column)."
        )
    return found


def _column(rows: Sequence[Mapping[str, Any]], data: DataSpec) -> str:
    if dict(DEFAULT_DATA) == _dumped(data):
        return DEFAULT_COLUMN
    texts = [name for name, value in rows[0].items() if isinstance(value, str)]
    if _COLUMN in texts or len(texts) == 1:
        return _COLUMN if _COLUMN in texts else texts[0]
    raise DataError(
        f"which column of {_named(data)} holds the texts? It has {', '.join(rows[0])}.",
        hint="Name it: --column, or column: in a recipe.",
    )


def _order(texts: Mapping[str, str], seed: int) -> list[str]:
    """Texts in an order that the seed decides, and the texts."""
    return [text for _, text in sorted((_key(f"{seed} {key}"), text) for key, text in texts.items())]


def _key(text: str) -> str:
    """What is the same for texts that differ in white space only."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _dumped(data: DataSpec) -> dict[str, Any]:
    plain = data.model_dump(mode="json")
    if "rows" in plain:
        rows = json.dumps(plain["rows"], sort_keys=True, default=repr)
        return {"rows": hashlib.sha256(rows.encode()).hexdigest()[:16]}
    return plain


def _named(data: DataSpec) -> str:
    return f"data.{data.kind}" + ("" if data.kind == "rows" else f"={getattr(data, data.kind)!r}")

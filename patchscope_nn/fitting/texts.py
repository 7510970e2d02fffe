"""The texts of a fit: read, made distinct, and split to fit on, to choose settings by, and to hold out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscope_nn._util.digests import digest
from patchscope_nn.data.rows import DataSpec, load_rows
from patchscope_nn.errors import DataError, did_you_mean
from patchscope_nn.spec import Fit
from patchscope_nn.spec.prompts import text_of

#: The data to fit on if none is named, and its column.
DEFAULT_DATA: Mapping[str, Any] = {"builtin": "texts"}
DEFAULT_COLUMN = "text"
_DEFAULT = Fit()
#: The share of the texts to choose lambda or alpha by, among those that are not held out.
_CHOOSING = 0.1


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts, split so that no text is in two parts.

    Attributes:
        fitted: The texts to fit on.
        choosing: The texts to choose lambda or alpha by; the final map is fitted on them too.
        held_out: The texts that scores are computed on, and nothing else.
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
    held_out: float | DataSpec = _DEFAULT.held_out,
    limit: int | None = None,
    seed: int = _DEFAULT.seed,
    base: Path | None = None,
) -> Texts:
    """Read texts and split them.

    The part of a text is decided by a digest of the text and the seed, so that the order of the data and
    repeated texts make no difference.

    Args:
        data: Where the texts come from.
        column: The column of the texts; None is the only column with texts, or `text`.
        held_out: The share of the texts to hold out; or separate data, all of it held out.
        limit: The most rows to read from each of the data.
        seed: Decides which texts are held out.
        base: The folder that relative files start from.

    Raises:
        DataError: The data cannot be read, lacks the column, or is too little; or the data to hold out is the
            data to fit on.
    """
    if held_out == data:
        raise DataError(
            f"held_out names the same data as is fitted on, {_named(data)}.",
            hint="A score on the data of the fit says nothing. Name other data, or a share, for example 0.2.",
        )
    known, dropped = _distinct(data, column=column, limit=limit, base=base), 0
    mixed = _order(known, seed)
    if isinstance(held_out, DataSpec):
        separate = _distinct(held_out, column=column, limit=limit, base=base)
        rest, held = mixed, _not_known(separate, known, held_out)
        dropped = len(separate) - len(held)
    else:
        count = _count(held_out, len(mixed))
        held, rest = mixed[:count], mixed[count:]
    chosen = max(1, round(_CHOOSING * len(rest)))
    if len(rest) <= chosen:
        raise DataError(
            f"{_named(data)} has {len(known)} different texts; a fit needs at least 3: to fit on, to choose "
            "settings by, and to hold out.",
            hint="Give some hundreds or more.",
        )
    about = {
        "fitted_on": _about(data, rest),
        "held_out": _about(held_out if isinstance(held_out, DataSpec) else data, held) | {"dropped": dropped},
    }
    return Texts(
        fitted=tuple(rest[chosen:]), choosing=tuple(rest[:chosen]), held_out=tuple(held), about=about
    )


def _not_known(separate: Mapping[str, str], known: Mapping[str, str], data: DataSpec) -> list[str]:
    """The texts of separate data that are not fitted on; both by their keys."""
    held = [text for key, text in separate.items() if key not in known]
    if not held:
        raise DataError(
            f"every text of held_out, {_named(data)}, is among those that are fitted on.",
            hint="A score on the data of the fit says nothing. Hold other texts out.",
        )
    return held


def _count(share: float, n_texts: int) -> int:
    if not 0 < share < 1:
        raise DataError(
            f"held_out={share} is not a share of the texts.",
            hint="Give a number above 0 and below 1, or data.",
        )
    return max(1, round(share * n_texts))


def _about(data: DataSpec, texts: Sequence[str]) -> dict[str, Any]:
    return {"data": _dumped(data), "n_texts": len(texts), "digest": digest_of(texts)}


def digest_of(texts: Iterable[str]) -> str:
    """16 hex digits that identify a set of texts, independent of their order."""
    keys = sorted(_key(text) for text in texts)
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


def column_texts(rows: Sequence[Mapping[str, Any]], column: str | None) -> list[str]:
    """The texts of a column, or of the only column if none is named.

    Raises:
        DataError: The column is missing, or there are several and none is named.
    """
    columns = list(rows[0])
    if column is None and len(columns) != 1:
        raise DataError(
            f"the data has the columns {', '.join(columns)}, and none was named.",
            hint="Name the column of the texts (--column).",
        )
    column = columns[0] if column is None else column
    if column not in columns:
        raise DataError(f"column={column!r} is not a column of the data.", hint=did_you_mean(column, columns))
    return [text_of(row, column, field=f"data row {number}") for number, row in enumerate(rows)]


def _distinct(data: DataSpec, *, column: str | None, limit: int | None, base: Path | None) -> dict[str, str]:
    rows = load_rows(data, base=base, limit=limit)
    name = column or _column(rows, data)
    if name not in rows[0]:
        raise DataError(
            f"{_named(data)} has no column {name!r}; it has {', '.join(rows[0])}.",
            hint="Name the column of the texts (--column).",
        )
    texts: dict[str, str] = {}
    for row in rows:
        if isinstance(text := row[name], str) and text.strip():
            texts.setdefault(_key(text), text)
    if not texts:
        raise DataError(
            f"column {name!r} of {_named(data)} holds no text.", hint="Name another column (--column)."
        )
    return texts


def _column(rows: Sequence[Mapping[str, Any]], data: DataSpec) -> str:
    if dict(DEFAULT_DATA) == _dumped(data):
        return DEFAULT_COLUMN
    texts = [name for name, value in rows[0].items() if isinstance(value, str)]
    if DEFAULT_COLUMN in texts or len(texts) == 1:
        return DEFAULT_COLUMN if DEFAULT_COLUMN in texts else texts[0]
    raise DataError(
        f"which column of {_named(data)} holds the texts? It has {', '.join(rows[0])}.",
        hint="Name it: --column, or column: in a recipe.",
    )


def _order(texts: Mapping[str, str], seed: int) -> list[str]:
    """The texts in an order that only they and the seed decide."""
    return [text for _, text in sorted((_key(f"{seed} {key}"), text) for key, text in texts.items())]


def _key(text: str) -> str:
    """A digest that is the same for texts that differ only in white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def _dumped(data: DataSpec) -> dict[str, Any]:
    plain = data.model_dump(mode="json")
    return {"rows": digest(plain["rows"])} if "rows" in plain else plain


def _named(data: DataSpec) -> str:
    return f"data.{data.kind}" + ("" if data.kind == "rows" else f"={getattr(data, data.kind)!r}")

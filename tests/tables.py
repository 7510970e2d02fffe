"""Tables as a run makes them, of made-up words and numbers; and whether two runs gave the same table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.testing import assert_frame_equal

WORDS = (
    " Paris",
    " the",
    " a",
    "\n",
    " Wales",
    " princess",
    " 東京",
    " 🙂",
    "<b>",
    " of",
    " شكرا",
    " Country",
)
NASTY = (
    "</script><script>alert(1)</script><!-- \"'& <b>bold</b> %{y} 🙂 שלום \u202e\x00\x1b\ud800 \n\n"
    + "z" * 10_000
)
TEXTS = ("Country in Europe", "the capital city of France, on the Seine", "a princess\nof Wales", "Queen")


def make_table(
    readout: str = "next_token",
    *,
    n_rows: int = 20,
    layers: Sequence[int] = range(12),
    target_layers: Sequence[int] | None = None,
    controls: Sequence[str] = ("unpatched", "random"),
    positions: Sequence[int] = (3,),
    scales: Sequence[float] = (1.0,),
    samples: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """A tidy table as a run makes it (DESIGN section 4); by default the target layer is the source's."""
    parts = [
        _one_draw(
            readout=readout,
            n_rows=n_rows,
            layers=layers,
            target_layers=target_layers,
            controls=controls,
            positions=positions,
            seed=seed + 100 * sample,
        )
        .assign(scale=scale, sample=sample)
        .pipe(lambda part: part if scale == scales[0] else part[part["source_layer"].notna()])  # noqa: B023
        for scale in scales
        for sample in range(samples)
    ]
    return pd.concat(parts, ignore_index=True)


def _one_draw(
    *,
    readout: str,
    n_rows: int,
    layers: Sequence[int],
    target_layers: Sequence[int] | None,
    controls: Sequence[str],
    positions: Sequence[int],
    seed: int,
) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    places: list[tuple[int, str | None, int, int | None, int | None]] = []
    for row in range(n_rows):
        for control in (None, *controls):
            if control in ("unpatched", "text-only"):
                places.append((row, control, 0, None, None))
                continue
            places += [
                (row, control, position, source, target)
                for position in positions
                for source in layers
                for target in (target_layers or [source])
            ]
    cells = [_cell(readout, place=place, top=max(layers) or 1, generator=generator) for place in places]
    table = pd.DataFrame(cells)
    return table.astype({"source_layer": "Int64", "target_layer": "Int64"})


def _cell(
    readout: str,
    *,
    place: tuple[int, str | None, int, int | None, int | None],
    top: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    row, control, position, source, target = place
    skill = 0.9 * ((source or 0) / top) if control is None else 0.1
    cell: dict[str, Any] = {
        "row": row,
        "control": control,
        "source_prompt": f"In sentence number {row}, the Eiffel Tower is in the city of",
        "source_position": None if source is None else [position],
        "source_token": [] if source is None else [WORDS[position % len(WORDS)]],
        "source_layer": source,
        "target_prompt": "cat -> cat; 1135 -> 1135; hello -> hello; ?",
        "target_position": [17],
        "target_token": ["?"],
        "target_layer": target,
        "source_model": "builtin:smollm2-135m-instruct",
        "target_model": "builtin:smollm2-135m-instruct",
        "mapping": "identity",
    }
    unpatched = np.random.default_rng(1) if control == "unpatched" else generator
    probs = np.sort(unpatched.dirichlet(np.full(5, 0.6)))[::-1]
    words = [str(word) for word in unpatched.permutation(WORDS)[:5]]
    if readout == "next_token":
        hit = float(generator.random() < skill)
        cell |= {"top_tokens": words, "top_ids": list(range(5)), "top_probs": probs.tolist()}
        cell |= {"entropy_nats": 1.5, "surprisal_nats": float(8 * (1 - skill) + generator.random())}
        cell |= {"precision_at_1": hit}
    elif readout == "generate":
        cell |= {"text": TEXTS[int(unpatched.integers(4))], "stopped": "length"}
        cell |= {"rouge_l": float(skill * generator.random())}
    else:
        options = ["yes", "no", "perhaps"]
        odds = (probs[:3] / probs[:3].sum()).tolist()
        cell |= {"choices": options, "choice_logprobs": np.log(odds).tolist(), "choice_probs": odds}
        cell |= {"choice": options[0], "accuracy": float(skill > 0.5)}
    return cell | {"error": None}


#: Ranks up to this one are compared as they are: there, logits are far apart.
EXACT_RANKS = 100


def assert_same_table(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Compare two runs of the same cells, whose numbers may be rounded differently.

    Deep in the list, neighbours have nearly equal logits, and rounding makes them change places. There a rank
    may be off by one, and by one more for every 2,000 ranks.
    """
    assert_frame_equal(_settled(found, expected), expected, rtol=1e-4, atol=1e-4)


def _settled(found: pd.DataFrame, expected: pd.DataFrame) -> pd.DataFrame:
    """The table with the ranks that are as good as the expected ones replaced by these."""
    settled = found.copy()
    if len(found) != len(expected):
        return settled
    for name in {"rank", "reference_ranks"} & set(found.columns) & set(expected.columns):
        pairs = zip(found[name], expected[name], strict=True)
        settled[name] = pd.Series(
            [_settled_ranks(one, other) for one, other in pairs], index=found.index, dtype=found[name].dtype
        )
    return settled


def _settled_ranks(found: Any, expected: Any) -> Any:
    if isinstance(found, list | np.ndarray) and isinstance(expected, list | np.ndarray):
        if len(found) != len(expected):
            return found
        return [_settled_ranks(one, other) for one, other in zip(found, expected, strict=True)]
    deep = pd.notna(found) and pd.notna(expected) and expected > EXACT_RANKS
    return expected if deep and abs(found - expected) <= 1 + expected // 2000 else found

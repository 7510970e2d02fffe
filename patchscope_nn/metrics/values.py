"""The included metrics: functions of a cell's columns and its data row, or (`by_column`) of many cells.

To include another metric, add a function here. `registry.py` documents the decorator.

ROUGE is implemented here and compared with rouge-score in the tests, because importing that package takes two
seconds (it loads nltk, scipy and scikit-learn), and it needs twice the time for each text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from patchscope_nn.metrics.registry import Columns, metric

_Rows = Sequence[Mapping[str, Any]]


@metric(title="Precision@1", readout="next_token", needs="reference", by_column=True)
def precision_at_1(columns: Columns, _rows: _Rows) -> Any:
    """1 if the patched run's top token is the reference token, else 0 (section 4.1)."""
    reference = columns.get("reference_ids")
    return None if reference is None else columns["top_ids"][:, 0] == reference[:, 0]


def _in_column(name: str) -> Callable[..., Any]:
    return lambda columns, _rows: columns.get(name)


#: Metrics that the readout computes, because only it has whole distributions.
for _name, _title in (
    ("surprisal_nats", "Surprisal (nats): -log p_source(top token of the patched run)"),  # section 4.1
    ("nll_nats", "NLL (nats): -log p_patched(reference token)"),  # of the first reference token
    ("kl_nats", "KL (nats): KL(source || patched)"),  # if both models share a vocabulary
):
    metric(
        name=_name,
        title=_title,
        readout="next_token",
        needs="reference",
        higher_is_better=False,
        by_column=True,
    )(_in_column(_name))


@metric(title="Top-k overlap with the source's own", readout="next_token", needs="reference", by_column=True)
def top_k_overlap(columns: Columns, _rows: _Rows) -> Any:
    """Share of the source model's top-k tokens that are among the patched run's top-k tokens, 0..1.

    k is `readout.next_token.top_k` (overlap at depth k: Webber et al. 2010, section 3).
    """
    own = columns.get("source_top_ids")
    return None if own is None else (own[:, :, None] == columns["top_ids"][:, None]).any(-1).mean(-1)


@metric(
    title="Rank of the reference token",
    readout="next_token",
    needs="reference",
    higher_is_better=False,
    by_column=True,
)
def rank(columns: Columns, _rows: _Rows) -> Any:
    """The rank of the reference token in the patched run, 1 for the top (Dar et al. 2023, section 4)."""
    ranks = columns.get("reference_ranks")
    return None if ranks is None else ranks[:, 0]


@metric(
    title="Reciprocal rank of the reference token", readout="next_token", needs="reference", by_column=True
)
def reciprocal_rank(columns: Columns, _rows: _Rows) -> Any:
    """1 / `rank`; its mean is the mean reciprocal rank (Voorhees 1999, section 3)."""
    ranks = columns.get("reference_ranks")
    return None if ranks is None else 1.0 / ranks[:, 0]


@metric(title="ROUGE-L", readout="generate")
def rouge_l(columns: Columns, row: Mapping[str, Any], *, reference: str) -> float:
    """ROUGE-L F1 of the generated text against a data column (section 4.3; Lin 2004), without stemming."""
    return rouge_l_f1(columns["text"], str(row[reference]))


@metric(title="ROUGE-1", readout="generate")
def rouge_1(columns: Columns, row: Mapping[str, Any], *, reference: str) -> float:
    """ROUGE-1 F1 of the generated text against a data column (appendix D; Lin 2004), without stemming."""
    return rouge_1_f1(columns["text"], str(row[reference]))


@metric(title="Contains the reference", readout="generate")
def contains(columns: Columns, row: Mapping[str, Any], *, reference: str) -> float | None:
    """1 if the generated text contains a data column's, else 0; case, spaces and punctuation are ignored.

    None if the column has no letter or digit, because every text would contain it. Section 4.2 ignores only
    spaces, and compares with case.
    """
    wanted = _letters(str(row[reference]))
    return float(wanted in _letters(columns["text"])) if wanted else None


@metric(
    title="Relevancy: mean |p_patched - p_unpatched| of the text's tokens",
    readout="generate",
    needs="relevancy",
)
def relevancy(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """Mean over the generated tokens of |p_patched - p_unpatched|, 0..1 (SelfIE: Chen et al. 2024).

    It measures how much the text depends on the state: near 0, the target model would generate it anyway.
    """
    patched, unpatched = columns.get("token_probs"), columns.get("unpatched_token_probs")
    if not patched or not unpatched:
        return None
    return sum(abs(p - q) for p, q in zip(patched, unpatched, strict=True)) / len(patched)


@metric(title="Accuracy", readout="choices")
def choice_accuracy(columns: Columns, row: Mapping[str, Any], *, answer: str) -> float:
    """1 if the most likely choice is a data column's text (surrounding spaces ignored), else 0."""
    return float(columns["choice"].strip() == str(row[answer]).strip())


@metric(title="Log-odds of the answer (nats)", readout="choices")
def choice_log_odds(columns: Columns, row: Mapping[str, Any], *, answer: str) -> float | None:
    """Log-odds in nats: log p(answer) - log of the sum of p over the other choices.

    It generalises the logit difference of Wang et al. 2023 (section 3) to more than two answers. Above 0, the
    answer is more likely than all other choices together. None if the answer is not among the choices, or is
    the only one.
    """
    wanted = str(row[answer]).strip()
    pairs = list(zip(columns["choices"], columns["choice_logprobs"], strict=True))
    right = [logprob for choice, logprob in pairs if choice.strip() == wanted]
    others = [logprob for choice, logprob in pairs if choice.strip() != wanted]
    if not right or not others:
        return None
    return _log_sum(right) - _log_sum(others)


@metric(title="Cosine with the state it replaced", readout="hidden", needs="clean")
def cosine(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """Cosine between the written state and the state it replaced; with several states, the mean."""
    return _mean_over_states(columns, _cosine)


@metric(title="Fraction of the replaced state's variance", readout="hidden", needs="clean")
def fraction_of_variance(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """Share of the replaced state's variance that the written state explains, at most 1.

    It is 1 - |f(h) - c|^2 / |c - mean(c)|^2, with the variance over the d_model components of the replaced
    state c, since a cell has no other sample. The score of a fit uses the variance over a data set instead
    (as in Fraser-Taliente et al. 2026). Below 0, the mean of c would be a better prediction than f(h).
    """
    return _mean_over_states(columns, _fraction)


def rouge_1_f1(text: str, reference: str) -> float:
    """Compute ROUGE-1 F1 of two texts: the words they share, counted with multiplicity (Lin 2004, section 2).

    It is in 0..1, and 0 if either text has no word.
    """
    ours, theirs = _words(text), _words(reference)
    return _f1((Counter(ours) & Counter(theirs)).total(), ours, theirs)


def rouge_l_f1(text: str, reference: str) -> float:
    """Compute ROUGE-L F1 of two texts: the longest common subsequence of their words (Lin 2004, section 3).

    It is in 0..1, and 0 if either text has no word.
    """
    ours, theirs = _words(text), _words(reference)
    return _f1(_longest_common_subsequence(ours, theirs), ours, theirs)


def _f1(common: int, ours: Sequence[str], theirs: Sequence[str]) -> float:
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def _longest_common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        previous = lengths[:]
        for column, other in enumerate(theirs, start=1):
            lengths[column] = (
                previous[column - 1] + 1 if word == other else max(previous[column], lengths[column - 1])
            )
    return lengths[-1]


def _log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(sum(math.exp(value - highest) for value in logs))


Vector = Sequence[float]


def _mean_over_states(columns: Columns, score: Callable[[Vector, Vector], float | None]) -> float | None:
    written, clean = columns.get("hidden"), columns.get("clean")
    if not written or not clean:
        return None
    scores = [score(*pair) for pair in zip(written, clean, strict=True)]
    numbers = [value for value in scores if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(scores) else None


def _cosine(written: Vector, clean: Vector) -> float | None:
    product = sum(a * b for a, b in zip(written, clean, strict=True))
    norms = math.hypot(*written) * math.hypot(*clean)
    return product / norms if norms else None


def _fraction(written: Vector, clean: Vector) -> float | None:
    mean = sum(clean) / len(clean)
    variance = sum((a - mean) ** 2 for a in clean)
    residual = sum((a - b) ** 2 for a, b in zip(written, clean, strict=True))
    return 1.0 - residual / variance if variance else None

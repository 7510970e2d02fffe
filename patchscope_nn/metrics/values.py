"""The metrics that ship: each takes a cell's columns and its data row, and returns a number or None.

A new metric is a function here; nothing else names it. `registry.py` says what the decorator takes.

ROUGE is computed here and compared with rouge-score in the tests: that package takes two seconds to import,
since it loads nltk and with it scipy and scikit-learn, and twice the time for each text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from patchscope_nn.metrics.registry import Columns, metric


@metric(title="Precision@1", readout="next_token", needs="reference")
def precision_at_1(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """1 where the patched run's top token is the reference token, else 0 (section 4.1)."""
    reference = columns.get("reference_ids")
    return None if not reference else float(columns["top_ids"][0] == reference[0])


@metric(
    title="Surprisal (nats): -log p_source(top token of the patched run)",
    readout="next_token",
    needs="reference",
    higher_is_better=False,
)
def surprisal_nats(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """-log p_source(top token of the patched run), the paper's surprisal (section 4.1)."""
    return columns.get("surprisal_nats")


@metric(
    title="NLL (nats): -log p_patched(reference token)",
    readout="next_token",
    needs="reference",
    higher_is_better=False,
)
def nll_nats(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """-log p_patched(first reference token)."""
    return columns.get("nll_nats")


@metric(
    title="KL (nats): KL(source || patched)",
    readout="next_token",
    needs="reference",
    higher_is_better=False,
)
def kl_nats(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """KL(p_source || p_patched), where both models share a vocabulary."""
    return columns.get("kl_nats")


@metric(title="Top-k overlap with the source's own", readout="next_token", needs="reference")
def top_k_overlap(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """Share of the source's own top-k tokens that are among the patched run's top-k, 0..1.

    Both lists are of `readout.next_token.top_k` tokens (overlap at depth k: Webber et al. 2010, section 3).
    """
    own = columns.get("source_top_ids")
    return None if not own else len({*own} & {*columns["top_ids"]}) / len(own)


@metric(title="Rank of the reference token", readout="next_token", needs="reference", higher_is_better=False)
def rank(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """The rank of the reference token in the patched run, 1 for the top (Dar et al. 2023, section 4)."""
    ranks = columns.get("reference_ranks")
    return None if not ranks else float(ranks[0])


@metric(title="Reciprocal rank of the reference token", readout="next_token", needs="reference")
def reciprocal_rank(columns: Columns, row: Mapping[str, Any]) -> float | None:
    """1 / `rank`; its mean is the mean reciprocal rank (Voorhees 1999, section 3)."""
    found = rank(columns, row)
    return None if found is None else 1.0 / found


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
    """1 where the text holds a data column's, both lower-cased and without spaces and marks, else 0.

    None where the column has no letter or digit, which every text would hold. Section 4.2 leaves out the
    spaces alone and minds the case.
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

    How much the text owes to the state: near 0 the target model would have said it anyway.
    """
    patched, unpatched = columns.get("token_probs"), columns.get("unpatched_token_probs")
    if not patched or not unpatched:
        return None
    return sum(abs(one - other) for one, other in zip(patched, unpatched, strict=True)) / len(patched)


@metric(title="Accuracy", readout="choices")
def choice_accuracy(columns: Columns, row: Mapping[str, Any], *, answer: str) -> float:
    """1 where the most likely choice is a data column's, spaces around it left out, else 0."""
    return float(columns["choice"].strip() == str(row[answer]).strip())


@metric(title="Log-odds of the answer (nats)", readout="choices")
def choice_log_odds(columns: Columns, row: Mapping[str, Any], *, answer: str) -> float | None:
    """Log-odds in nats: log p(answer) - log of the sum of the other choices' p; above 0 it has the most.

    The logit difference of Wang et al. 2023 (section 3), for more than two answers. None where the answer is
    no choice, or is the only one.
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
    """Cosine between the state that was written and the one it replaced; the mean where they are several."""
    return _mean_over_states(columns, _cosine)


@metric(title="Fraction of the replaced state's variance", readout="hidden", needs="clean")
def fraction_of_variance(columns: Columns, _row: Mapping[str, Any]) -> float | None:
    """How much of the replaced state's variance the written one has: 1 - |f(h) - c|^2 / |c - mean(c)|^2.

    The variance is that over the d_model components of one state c, since a cell has no other; a fit's (as in
    Fraser-Taliente et al. 2026) is over a data set. At most 1; below 0 the mean of c would be nearer.
    """
    return _mean_over_states(columns, _fraction)


def rouge_1_f1(text: str, reference: str) -> float:
    """ROUGE-1 F1 of two texts: the words they share, as often as both have them (Lin 2004, section 2).

    Args:
        text: The text.
        reference: The reference.

    Returns:
        A number in 0..1; 0 where either has no word.
    """
    ours, theirs = _words(text), _words(reference)
    return _f1((Counter(ours) & Counter(theirs)).total(), ours, theirs)


def rouge_l_f1(text: str, reference: str) -> float:
    """ROUGE-L F1 of two texts: the longest common subsequence of their words (Lin 2004, section 3).

    Args:
        text: The text.
        reference: The reference.

    Returns:
        A number in 0..1; 0 where either has no word.
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
        before = lengths[:]
        for place, other in enumerate(theirs, start=1):
            lengths[place] = (
                before[place - 1] + 1 if word == other else max(before[place], lengths[place - 1])
            )
    return lengths[-1]


def _log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(sum(math.exp(one - highest) for one in logs))


Vector = Sequence[float]


def _mean_over_states(columns: Columns, of: Callable[[Vector, Vector], float | None]) -> float | None:
    written, clean = columns.get("hidden"), columns.get("clean")
    if not written or not clean:
        return None
    found = [of(*pair) for pair in zip(written, clean, strict=True)]
    numbers = [one for one in found if one is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(found) else None


def _cosine(one: Vector, other: Vector) -> float | None:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.hypot(*one) * math.hypot(*other)
    return product / norms if norms else None


def _fraction(written: Vector, clean: Vector) -> float | None:
    middle = sum(clean) / len(clean)
    variance = sum((a - middle) ** 2 for a in clean)
    missed = sum((a - b) ** 2 for a, b in zip(written, clean, strict=True))
    return 1.0 - missed / variance if variance else None

"""Linear probes, which read hidden states without a Patchscope (the baseline of section 4.2).

For every source layer, a logistic regression on standardised states predicts the class of a data row. It is
scored by k-fold cross-validation. Folds split the source prompts, so that no prompt is in both training and
test. A class that is missing from a fold's training rows cannot be predicted and counts as an error.

Its controls are the commonest class of the training rows, a probe trained on shuffled labels, and the probe's
predictions for the run's control cells (another row's state, a random one).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchscope_nn.errors import DataError, InputError
from patchscope_nn.recipe import PROBE_METRICS

PROBE_COLUMNS = ("probe_choice", *PROBE_METRICS)
_STEPS = 5000  # of lbfgs; a few hundred are enough on standardised states


@dataclass(frozen=True, kw_only=True)
class States:
    """The hidden states of one layer, with a label and a fold for each.

    Attributes:
        vectors: The states, (state, d_model).
        label: The class of each state's data row, (state,).
        fold: The fold in which each state is held out, (state,).
        trains: True for each state that a probe may train on, (state,); states of controls are only tested.
    """

    vectors: np.ndarray
    label: np.ndarray
    fold: np.ndarray
    trains: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predicted class of each state, from the fold in which it was held out; each field is (state,).

    `choice` is the probe's, `majority` the commonest class of the fold's training states, and `shuffled` that
    of a probe that was trained on shuffled labels.
    """

    choice: np.ndarray
    majority: np.ndarray
    shuffled: np.ndarray


def check_probe(labels: Sequence[str], prompts: Sequence[str], *, folds: int) -> None:
    """Check, before anything runs, that a probe can be trained on the classes and prompts of the data rows.

    Raises:
        InputError: scikit-learn is not installed.
        DataError: There are fewer prompts than folds, or a single class.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(
            "a probe needs scikit-learn, which is not installed.", hint="pip install 'patchscope-nn[probes]'"
        )
    distinct = len(set(prompts))
    if distinct < folds:
        raise DataError(
            f"probe.folds={folds} needs as many different source prompts, and the data has {distinct}.",
            hint="Use more rows (raise --limit) or fewer folds.",
        )
    if len(set(labels)) == 1:
        raise DataError(
            f"probe.label: every data row has the class {labels[0]!r}.",
            hint="Name a column with at least two values.",
        )


def fold_of(prompts: Sequence[str], *, folds: int, seed: int = 0) -> np.ndarray:
    """Assign each data row to a fold, (row,); rows that share a source prompt share a fold."""
    from sklearn.model_selection import GroupKFold

    fold = np.zeros(len(prompts), dtype=int)
    splitter = GroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(fold, groups=np.asarray(prompts, dtype=object))):
        fold[held_out] = number
    return fold


def probe(states: States, *, seed: int = 0) -> Predictions:
    """Train a probe for each fold of a layer's states, and predict the classes of the states it holds out."""
    generator = np.random.default_rng(seed)
    blank = np.full(len(states.label), "", dtype=object)
    predicted = Predictions(choice=blank, majority=blank.copy(), shuffled=blank.copy())
    for fold in np.unique(states.fold):
        train, test = states.trains & (states.fold != fold), states.fold == fold
        labels = states.label[train]
        classes, counts = np.unique(labels, return_counts=True)
        predicted.majority[test] = classes[counts.argmax()]
        for column, y in ((predicted.choice, labels), (predicted.shuffled, generator.permutation(labels))):
            column[test] = _fit_and_predict(states.vectors[train], y, states.vectors[test])
    return predicted


def _fit_and_predict(vectors: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) == 1:  # scikit-learn refuses to fit a single class
        return np.full(len(held_out), labels[0], dtype=object)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        predicted: np.ndarray = model.fit(vectors, labels.astype(str)).predict(held_out)
    return predicted


def probe_columns(
    rows: Iterable[Mapping[str, Any]], *, labels: Sequence[str], prompts: Sequence[str], folds: int, seed: int
) -> dict[str, list[Any]]:
    """Compute the columns that a probe adds to a run's table.

    A cell that reads several tokens counts by the mean of their `hidden` states. `labels` and `prompts` are
    the class and the source prompt of each data row.

    Returns:
        A value for each cell and column of `PROBE_COLUMNS`; None for a cell without a layer or a state.
    """
    row_and_real: list[tuple[int, bool]] = []
    states: dict[int, list[tuple[int, np.ndarray]]] = {}  # by layer, the number of each cell and its state
    for index, cell in enumerate(rows):
        row_and_real.append((cell["row"], cell["control"] is None))
        layer, hidden = cell["source_layer"], cell["hidden"]
        if layer is not None and hidden is not None:
            states.setdefault(layer, []).append((index, np.asarray(hidden, dtype=np.float32).mean(axis=0)))
    fold, label = fold_of(prompts, folds=folds, seed=seed), np.asarray(labels, dtype=object)
    columns: dict[str, list[Any]] = {name: [None] * len(row_and_real) for name in PROBE_COLUMNS}
    for in_layer in states.values():
        indices, vectors = zip(*in_layer, strict=True)
        row, real = map(np.array, zip(*(row_and_real[index] for index in indices), strict=True))
        known = States(vectors=np.stack(vectors), label=label[row], fold=fold[row], trains=real)
        predicted = probe(known, seed=seed)
        for number, index in enumerate(indices):
            columns["probe_choice"][index] = str(predicted.choice[number])
            classes = (predicted.choice[number], predicted.majority[number], predicted.shuffled[number])
            for metric, name in zip(PROBE_METRICS, classes, strict=True):
                columns[metric][index] = float(name == known.label[number])
    return columns

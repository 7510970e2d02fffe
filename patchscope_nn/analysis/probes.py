"""Linear probes: what can be read of hidden states without a Patchscope (the baseline of section 4.2).

For every source layer a logistic regression on standardised states says the class of a data row. It is scored
by k-fold cross-validation: folds are of source prompts, so that none is ever on both sides, and the classes
are those seen in training, so that a class that is new to a fold counts as missed.

Its controls: the commonest class of the training rows, a probe trained on shuffled labels, and what the probe
says of the run's control cells (another row's state, a random one).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchscope_nn.errors import DataError, InputError
from patchscope_nn.recipe import PROBE_METRICS

PROBE_COLUMNS = ("probe_choice", *PROBE_METRICS)
_STEPS = 5000  # of lbfgs; a few hundred are enough on standardised states


@dataclass(frozen=True, kw_only=True)
class States:
    """Hidden states of one layer, and what is known of each.

    Attributes:
        vectors: (state, d_model).
        label: The class of each state's data row.
        fold: The fold that does not see it.
        trains: Whether it may be trained on; the states of controls may not.
    """

    vectors: np.ndarray
    label: np.ndarray
    fold: np.ndarray
    trains: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Said:
    """What probes say of each state, by the fold that did not see it; each (state,).

    Attributes:
        choice: The class that the probe names.
        majority: The commonest class of its training states.
        shuffled: The class that a probe names that was trained on shuffled labels.
    """

    choice: np.ndarray
    majority: np.ndarray
    shuffled: np.ndarray


def check_probe(labels: Sequence[str], prompts: Sequence[str], *, folds: int) -> None:
    """Check that a probe can be trained, before anything runs.

    Args:
        labels: The class of each data row.
        prompts: The source prompt of each.
        folds: How many folds.

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
            f"probe.folds={folds}, and the data has {distinct} different source prompts.",
            hint="Give more rows (raise --limit), or fewer folds.",
        )
    if len(set(labels)) == 1:
        raise DataError(
            f"probe.label: every data row is of the class {labels[0]!r}.", hint="Name a column that differs."
        )


def fold_of(prompts: Sequence[str], *, folds: int, seed: int = 0) -> np.ndarray:
    """The fold of each data row: rows with one source prompt are in one fold, (row,).

    Args:
        prompts: The source prompt of each row.
        folds: How many folds.
        seed: The seed that deals the prompts out.
    """
    from sklearn.model_selection import GroupKFold

    found = np.zeros(len(prompts), dtype=int)
    dealer = GroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(dealer.split(found, groups=np.asarray(prompts, dtype=object))):
        found[held_out] = number
    return found


def probe(states: States, *, seed: int = 0) -> Said:
    """Train a probe for each fold, and let it say the class of the states it did not see.

    Args:
        states: The states of one layer.
        seed: The seed that shuffles labels.
    """
    generator = np.random.default_rng(seed)
    blank = np.full(len(states.label), "", dtype=object)
    said = Said(choice=blank, majority=blank.copy(), shuffled=blank.copy())
    for fold in np.unique(states.fold):
        seen, held_out = states.trains & (states.fold != fold), states.fold == fold
        labels = states.label[seen]
        classes, counts = np.unique(labels, return_counts=True)
        said.majority[held_out] = classes[counts.argmax()]
        for names, trained in ((said.choice, labels), (said.shuffled, generator.permutation(labels))):
            names[held_out] = _fit_and_say(states.vectors[seen], trained, states.vectors[held_out])
    return said


def _fit_and_say(vectors: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) == 1:  # what a fold that saw one class can say
        return np.full(len(asked), labels[0], dtype=object)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: np.ndarray = model.fit(vectors, labels.astype(str)).predict(asked)
    return found


def probe_columns(
    rows: Sequence[Mapping[str, Any]], *, labels: Sequence[str], prompts: Sequence[str], folds: int, seed: int
) -> dict[str, list[Any]]:
    """The columns a probe adds to a run's table.

    Args:
        rows: The cells, with their `hidden` states; of several tokens read together the mean is taken.
        labels: The class of each data row.
        prompts: The source prompt of each data row.
        folds: How many folds.
        seed: The seed of folds and shuffled labels.

    Returns:
        A value for each cell and column of `PROBE_COLUMNS`; None where a cell has no state of a layer.
    """
    places: dict[int, list[int]] = {}
    vectors: dict[int, list[np.ndarray]] = {}
    where: list[tuple[int, bool]] = []
    for place, cell in enumerate(rows):
        where.append((cell["row"], cell["control"] is None))
        layer, hidden = cell["source_layer"], cell["hidden"]
        if layer is None or hidden is None:
            continue
        places.setdefault(layer, []).append(place)
        vectors.setdefault(layer, []).append(np.asarray(hidden, dtype=np.float32).mean(axis=0))
    dealt, named = fold_of(prompts, folds=folds, seed=seed), np.asarray(labels, dtype=object)
    found: dict[str, list[Any]] = {name: [None] * len(where) for name in PROBE_COLUMNS}
    for layer, own in places.items():
        row = np.array([where[place][0] for place in own])
        trains = np.array([where[place][1] for place in own])
        states = States(vectors=np.stack(vectors[layer]), label=named[row], fold=dealt[row], trains=trains)
        said = probe(states, seed=seed)
        for index, place in enumerate(own):
            right = states.label[index]
            names = (said.choice[index], said.majority[index], said.shuffled[index])
            found["probe_choice"][place] = str(names[0])
            for column, name in zip(PROBE_METRICS, names, strict=True):
                found[column][place] = float(name == right)
    return found

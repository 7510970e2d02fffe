"""The expected results of the cells of trials, computed with plain hooks on the model's own forward."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from patchscope_nn.proof.hooks import Hooks, Place, Write, distance, spread
from patchscope_nn.proof.trials import CHOICE_LENGTHS, Lengths, Runner, Trial
from patchscope_nn.sweep import Cell


class Reference:
    """The expected results of the cells of trials, computed with plain hooks. Each forward runs only once.

    Attributes:
        ahead: How much a write changed the logits of earlier tokens, in standard deviations: 0 if no token
            attends to later ones.
    """

    def __init__(self, runner: Runner, hooks: Hooks) -> None:
        self.runner, self.hooks = runner, hooks
        self._states: dict[Any, torch.Tensor] = {}
        self._logits: dict[Any, torch.Tensor] = {}
        self.ahead = 0.0

    def prepare(self, *trials: Trial) -> None:
        """Read the states of trials; for next-token trials also run the forwards of each row in one batch."""
        wanted: dict[Lengths, list[tuple[Place, Place]]] = {}
        for trial in trials:
            for row in trial.rows:
                self._read(trial, row)
                keys = self._keys(trial) if trial.readout.name == "next_token" else []
                wanted.setdefault(row, []).extend(key for key in keys if (row, *key) not in self._logits)
        for row, keys in wanted.items():
            if keys:
                writes = [self.write(row, *key) for key in keys]
                rows = self.hooks.logits(self.runner.target_prompt(row), [*writes, None])
                self._logits |= {(row, *key): logits[-1] for key, logits in zip(keys, rows, strict=False)}
                self._logits[row] = rows[-1, -1]
                before = rows[:, : row.target - 2]
                self.ahead = max(self.ahead, distance(before, before[:1].expand_as(before), rows))

    def _read(self, trial: Trial, row: Lengths) -> None:
        """Read the states that a row of a trial writes, and for `hidden` also those that it replaces."""
        places = [Place(layer, trial.sites[0]) for layer in trial.layers]
        missing = [place for place in places if (row, place) not in self._states]
        read = self.hooks.read(self.runner.source_prompt(row), missing) if missing else {}
        self._states |= {(row, place): states[-1] for place, states in read.items()}
        if trial.readout.name == "hidden":
            written = [*dict.fromkeys(written for _, written in self._keys(trial))]
            clean = self.hooks.read(self.runner.target_prompt(row), written)
            self._states |= {("clean", row, place): states[-2] for place, states in clean.items()}

    def _keys(self, trial: Trial) -> list[tuple[Place, Place]]:
        """List where the cells of a row of a trial read and write."""
        layers: Iterable[tuple[int, int]] = zip(trial.layers, trial.layers, strict=True)
        if trial.target_layers != "same":
            layers = product(trial.layers, trial.target_layers)
        read, written = trial.sites
        return [(Place(layer, read), Place(other, written)) for layer, other in layers]

    def write(self, row: Lengths, read: Place, written: Place) -> Write:
        """Return the write of a cell."""
        return Write(written, row.target - 2, self._states[row, read])

    def error(self, trial: Trial, cell: Cell, raw: dict[str, Any]) -> float:
        """Return the error of a cell's readout, in standard deviations of the compared values."""
        row = trial.rows[cell.row]
        read = Place(cell.source_layer or 0, trial.sites[0])
        written = Place(cell.target_layer or 0, trial.sites[1])
        if trial.readout.name == "next_token":
            logits = self._logits[row] if trial.cuts else self._logits[row, read, written]
            wanted = logits.log_softmax(-1)[raw["top_ids"]]
            below = float((logits.amax() - logits[raw["top_ids"][0]]).cpu() / spread(logits))
            return max(below, distance(torch.tensor(raw["top_probs"]).log(), wanted, logits))
        write = self.write(row, read, written)
        if trial.readout.name == "hidden":
            clean = self._states["clean", row, written]
            pairs = ((raw["hidden"], write.state), (raw["clean"], clean))
            return max(distance(torch.tensor(states[0]), wanted, wanted) for states, wanted in pairs)
        prompt = self.runner.target_prompt(row)
        if trial.readout.name == "choices":
            return self._choices_error(prompt, raw["choice_logprobs"], write)
        return self._text_error(trial, prompt, raw, write)

    def _choices_error(self, prompt: list[int], logprobs: list[float], write: Write) -> float:
        """Return the largest error of the summed log-probabilities of the continuations."""
        errors = []
        ids = self.runner.ids["s"]
        # If scores depend only on earlier tokens, the longest choice's forward also scores a choice of one.
        longest = self.hooks.scored(prompt, ids[-max(CHOICE_LENGTHS) :], write)
        for count, logprob in zip(CHOICE_LENGTHS, logprobs, strict=True):
            more, logits = ids[-count:], longest[:count]
            if count < max(CHOICE_LENGTHS) and not (count == 1 and self.hooks.incremental):
                logits = self.hooks.scored(prompt, more, write)
            wanted = logits.log_softmax(-1)[range(count), more].sum()
            errors.append(distance(torch.tensor(logprob), wanted, logits))
        return max(errors)

    def _text_error(self, trial: Trial, prompt: list[int], raw: dict[str, Any], write: Write) -> float:
        """Return the largest error of decoded tokens: of probabilities, or of their distance to the top."""
        tokens, most = raw["token_ids"], trial.readout.decoded
        compares_unpatched = "unpatched_token_probs" in raw
        logits = self.hooks.continued(prompt, tokens[: most - 1], write, unpatched=compares_unpatched)
        below = [row.amax() - row[token] for row, token in zip(logits, tokens, strict=False)]
        if raw["stopped"] == "eos":
            below.append(logits[len(tokens)].amax() - logits[len(tokens)][trial.eos])
        elif len(tokens) != most:
            return float("inf")
        error = float(torch.stack(below).amax().cpu() / spread(logits))
        if not (tokens and compares_unpatched):
            return error
        clean = self.hooks.continued(prompt, tokens[: most - 1], None)
        for name, rows in (("token_probs", logits), ("unpatched_token_probs", clean)):
            logprobs = [row.log_softmax(-1)[token] for row, token in zip(rows, tokens, strict=False)]
            error = max(error, distance(torch.tensor(raw[name]).log(), torch.stack(logprobs), logits))
        return error

    def next_decoded(self, row: Lengths, layer: int, tokens: list[int]) -> int:
        """Return the token that a row decodes after `tokens`."""
        place = Place(layer)
        logits = None if tokens else self._logits.get((row, place, place))
        if logits is None:
            write = self.write(row, place, place)
            logits = self.hooks.continued(self.runner.target_prompt(row), tokens, write)[-1]
        return int(logits.argmax().item())

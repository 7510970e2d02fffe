"""The trials of the proof: small sweeps through the compiler, each cell beside the model under plain hooks.

A trial is one readout, one site on each side, and data rows of random prompts. `Runner` runs it with any set
of optimisations; `Reference` says what every cell should give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from patchscope_nn.backends import Local, execute, results_of
from patchscope_nn.cells import Cell, Sweep, expand
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, Verdict, usable_memory
from patchscope_nn.plan import Optimisations, Plan, Step, plan
from patchscope_nn.proof.hooks import Hooks, Place, Write
from patchscope_nn.proof.prompts import Numbers, random_ids
from patchscope_nn.spec import (
    Choices,
    Cut,
    Generate,
    Hidden,
    NextToken,
    Patchscope,
    Readout,
    Site,
    Source,
    Target,
)
from patchscope_nn.unpack import Work, eos_ids, unpack

#: The tokens that all target prompts of a trial begin with, so that there is a prefix to share.
_PREFIX = 3
#: How many top tokens a next-token trial compares, and how many a decoding one decodes.
_COMPARED, DECODED = 24, 3
#: The choices, in tokens: one continuation needs a forward, the other none.
_CHOICES = (3, 1)

Results = list[tuple[Cell, dict[str, Any]]]
_IDENTITY = ResolvedMapping(name="identity", kind="identity")


class Works(NamedTuple):
    """A trial as steps in plain values.

    Attributes:
        steps: What `emit` takes, a step each.
        plans: The plan and the step that each was made of.
    """

    steps: list[Work]
    plans: tuple[tuple[Plan, Step], ...]

    def rows(self, results: Sequence[Any]) -> list[dict[str, Any]]:
        """The raw readout of every cell, in the sweep's order, of what the steps gave."""
        cells = [
            cell
            for (planned, step), result in zip(self.plans, results, strict=True)
            for cell in results_of(planned, step, result)
        ]
        return [raw for _, raw in sorted(cells, key=lambda result: result[0].number)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One comparison.

    Attributes:
        readout: What is read.
        rows: For each data row the number of tokens of its source and target prompt; a negative number is of
            another prompt that is as long.
        layers: l.
        target_layers: l*; `same` pairs it with l.
        sites: What of a block is read, and what is written.
        cuts: Whether, instead of a write, attention is cut to a token that is not seen anyway. The run then
            equals one without a patch.
    """

    readout: Readout
    rows: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    target_layers: tuple[int, ...] | Literal["same"] = "same"
    sites: tuple[Site, Site] = ("residual", "residual")
    cuts: bool = False

    @property
    def name(self) -> str:
        """The readout, and the sites where they are not the residual stream."""
        sites = "" if set(self.sites) == {"residual"} else f", {self.sites[0]} to {self.sites[1]}"
        return f"{self.readout.name}{sites}{', attention mask' if self.cuts else ''}"

    @property
    def decoded(self) -> int:
        """How many tokens it decodes; 0 for a readout that does not."""
        return self.readout.max_new_tokens if isinstance(self.readout, Generate) else 0

    @property
    def tokens(self) -> int:
        """The longest prompt, appended tokens included."""
        more = max(_CHOICES) if isinstance(self.readout, Choices) else self.decoded
        return max(max(abs(source), abs(target) + more) for source, target in self.rows)


def readout_of(kind: type[Readout]) -> Readout:
    """A readout as the trials use it; their texts are columns of the trials' rows."""
    if kind is NextToken:
        return NextToken(top_k=_COMPARED)
    if kind is Choices:
        return Choices(["{c0}", "{c1}"])
    return Generate(max_new_tokens=DECODED, relevancy=True) if kind is Generate else Hidden(clean=True)


class Runner:
    """Runs trials of one model through the compiler.

    Attributes:
        model: The model, whose prompts are numbers.
        verdict: What is held of it so far: how long a packed pass may be.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.verdict = model, Verdict(key="")
        self.memory = usable_memory(model.info)
        self.ids = {name: random_ids(model, 64, seed=seed) for seed, name in enumerate("st")}

    def prompt(self, side: str, count: int) -> list[int]:
        """A random prompt; target prompts begin alike, and differ at their end."""
        if side == "t":
            return [*self.ids["t"][:_PREFIX], *random_ids(self.model, abs(count), seed=count)[_PREFIX:]]
        return random_ids(self.model, abs(count), seed=-count)

    def row(self, source: int, target: int) -> dict[str, str]:
        """A data row of a trial: its prompts and its choices, as texts of numbers."""
        columns = {f"c{number}": self.ids["s"][-count:] for number, count in enumerate(_CHOICES)}
        columns |= {"s": self.prompt("s", source), "t": self.prompt("t", target)}
        return {name: "".join(f" {token}" for token in ids) for name, ids in columns.items()}

    def run(
        self,
        trial: Trial,
        optimisations: Optimisations,
        *,
        context: Literal["auto", "session"] = "session",
        eos: int | None = None,
    ) -> Results:
        """The raw readout of every cell of a trial, in the sweep's order."""
        model = self._model(eos)
        planned = plan(
            self._sweep(trial, model), context=context, memory=self.memory, optimisations=optimisations
        )
        steps = execute(planned, source=model, target=model, mapping=_IDENTITY, backend=Local())
        cells = [result for step in steps for result in step]
        return sorted(cells, key=lambda result: result[0].number)

    def works(self, trial: Trial, optimisations: Optimisations) -> Works:
        """The steps of a trial for a machine that is elsewhere."""
        model = self._model(None)
        planned = plan(self._sweep(trial, model), context="session", remote=True, optimisations=optimisations)
        steps = [*planned.steps()]
        made = [
            unpack(planned, step, source=model, target=model, mapping=_IDENTITY, states={}) for step in steps
        ]
        return Works(made, tuple((planned, step) for step in steps))

    def _model(self, eos: int | None) -> Model:
        return replace(
            self.model,
            info=replace(self.model.info, verdict=self.verdict),
            tokenizer=Numbers(len(self.model.tokenizer), eos=eos),
        )

    def _sweep(self, trial: Trial, model: Model) -> Sweep:
        scope = Patchscope(
            source=Source(prompt="{s}", layer=trial.layers, site=trial.sites[0]),
            target=Target(
                prompt="{t}",
                position=-2,
                layer=trial.target_layers,
                site=trial.sites[1],
                write=("cut", Cut(position=-1)) if trial.cuts else "replace",
            ),
            readout=trial.readout,
        )
        data = [self.row(*lengths) for lengths in trial.rows]
        return expand(scope, rows=data, source=model, target=model)


class Reference:
    """What the cells of trials should give, by plain hooks; each forward is run once.

    Attributes:
        ahead: How much a write changed the logits of tokens before it, in standard deviations: nothing, where
            no token sees those after it.
    """

    def __init__(self, runner: Runner, hooks: Hooks) -> None:
        self.runner, self.hooks = runner, hooks
        self._states: dict[Any, torch.Tensor] = {}
        self._logits: dict[Any, torch.Tensor] = {}
        self.ahead = 0.0

    def prepare(self, *trials: Trial) -> None:
        """Read every state of some trials; where one position is read, run a row's forwards at once."""
        wanted: dict[tuple[int, int], list[tuple[Place, Place]]] = {}
        for trial in trials:
            for source, target in trial.rows:
                self._read(trial, source, target)
                keys = self._keys(trial) if trial.readout.name == "next_token" else []
                unknown = [key for key in keys if (source, target, *key) not in self._logits]
                wanted.setdefault((source, target), []).extend(unknown)
        for (source, target), keys in wanted.items():
            if keys:
                writes = [self.write(source, target, *key) for key in keys]
                rows = self.hooks.logits(self.runner.prompt("t", target), [*writes, None])
                self._logits |= {
                    (source, target, *key): row[-1] for key, row in zip(keys, rows, strict=False)
                }
                self._logits[target] = rows[-1, -1]
                before = rows[:, : abs(target) - 2]
                self.ahead = max(self.ahead, _distance(before, before[:1].expand_as(before), rows))

    def _read(self, trial: Trial, source: int, target: int) -> None:
        """Read the states that a row of a trial writes, and those it writes over if they are asked for."""
        places = [Place(layer, trial.sites[0]) for layer in trial.layers]
        missing = [place for place in places if (source, place) not in self._states]
        read = self.hooks.read(self.runner.prompt("s", source), missing) if missing else {}
        self._states |= {(source, place): states[-1] for place, states in read.items()}
        if trial.readout.name == "hidden":
            written = [Place(layer, trial.sites[1]) for layer in self._written(trial)]
            clean = self.hooks.read(self.runner.prompt("t", target), written)
            self._states |= {("t", target, place): states[-2] for place, states in clean.items()}

    def _written(self, trial: Trial) -> tuple[int, ...]:
        return trial.layers if trial.target_layers == "same" else trial.target_layers

    def _keys(self, trial: Trial) -> list[tuple[Place, Place]]:
        read, written = trial.sites
        if trial.target_layers == "same":
            return [(Place(layer, read), Place(layer, written)) for layer in trial.layers]
        return [
            (Place(layer, read), Place(other, written))
            for layer in trial.layers
            for other in trial.target_layers
        ]

    def write(self, source: int, target: int, read: Place, written: Place) -> Write:
        """The write of a cell."""
        return Write(written, abs(target) - 2, self._states[source, read])

    def error(self, trial: Trial, cell: Cell, raw: dict[str, Any], *, eos: int | None = None) -> float:
        """How far a cell's readout is from the reference, in standard deviations of what is compared."""
        source, target = trial.rows[cell.row]
        read = Place(cell.source_layer or 0, trial.sites[0])
        written = Place(cell.target_layer or 0, trial.sites[1])
        if trial.readout.name == "next_token":
            logits = self._logits[target] if trial.cuts else self._logits[source, target, read, written]
            wanted = logits.log_softmax(-1)[raw["top_ids"]]
            below = float(((logits.amax() - logits[raw["top_ids"][0]]) / logits.std()).item())
            return max(below, _distance(torch.tensor(raw["top_probs"]).log(), wanted, logits))
        write = self.write(source, target, read, written)
        if trial.readout.name == "hidden":
            clean = self._states["t", target, written]
            pairs = ((raw["hidden"], write.state), (raw["clean"], clean))
            return max(_distance(torch.tensor(got[0]), want, want) for got, want in pairs)
        prompt = self.runner.prompt("t", target)
        if trial.readout.name == "choices":
            return self._choices_error(prompt, raw["choice_logprobs"], write)
        return self._text_error(prompt, raw, write, most=trial.decoded, eos=eos)

    def _choices_error(self, prompt: list[int], given: list[float], write: Write) -> float:
        """How far the summed log-probability of each continuation is off."""
        errors = []
        ids = self.runner.ids["s"]
        # Where each token is scored by those before it alone, the first one of any choice is scored alike.
        longest = self.hooks.scored(prompt, ids[-max(_CHOICES) :], write)
        for count, logprob in zip(_CHOICES, given, strict=True):
            more, logits = ids[-count:], longest[:count]
            if count < max(_CHOICES) and not (count == 1 and self.hooks.incremental):
                logits = self.hooks.scored(prompt, more, write)
            wanted = logits.log_softmax(-1)[range(count), more].sum()
            errors.append(_distance(torch.tensor(logprob), wanted, logits))
        return max(errors)

    def _text_error(
        self, prompt: list[int], raw: dict[str, Any], write: Write, *, most: int, eos: int | None
    ) -> float:
        """How far below the top token each decoded one is, and how far off its probability.

        An end counts as the likeliest of the ends.
        """
        tokens = raw["token_ids"]
        asked = "unpatched_token_probs" in raw
        logits = self.hooks.continued(prompt, tokens[: most - 1], write, unpatched=asked)
        below = [row.amax() - row[token] for row, token in zip(logits, tokens, strict=False)]
        if raw["stopped"] == "eos":
            ends = [*self._ends, *([] if eos is None else [eos])]
            below.append(logits[len(tokens)].amax() - logits[len(tokens)][ends].amax())
        elif len(tokens) != most:
            return float("inf")
        wanted = [row.log_softmax(-1)[token] for row, token in zip(logits, tokens, strict=False)]
        error = float((torch.stack(below).amax() / logits.std()).item())
        if not (tokens and asked):
            return error
        clean = self.hooks.unpatched(prompt, tokens[: most - 1])
        unpatched = [row.log_softmax(-1)[token] for row, token in zip(clean, tokens, strict=False)]
        for name, logprobs in (("token_probs", wanted), ("unpatched_token_probs", unpatched)):
            error = max(error, _distance(torch.tensor(raw[name]).log(), torch.stack(logprobs), logits))
        return error

    @cached_property
    def _ends(self) -> list[int]:
        return list(eos_ids(replace(self.runner.model, tokenizer=Numbers(0))))

    def next_decoded(self, source: int, target: int, layer: int, tokens: list[int]) -> int:
        """The token that a row decodes behind others."""
        place = Place(layer)
        logits = None if tokens else self._logits.get((source, target, place, place))
        if logits is None:
            write = self.write(source, target, place, place)
            logits = self.hooks.continued(self.runner.prompt("t", target), tokens, write)[-1]
        return int(logits.argmax().item())


def _distance(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest difference, in standard deviations of `scale`; infinite where a number is not finite."""
    wanted = wanted.cpu().float()
    difference = (got.cpu().float() - wanted).abs().amax() / scale.cpu().float().std()
    return float(difference.item()) if difference.isfinite() else float("inf")

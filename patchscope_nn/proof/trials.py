"""The trials of the proof: small sweeps through the compiler, whose cells are compared with plain hooks.

A trial has a readout, a site to read, a site to write, and data rows of random prompts. `Runner` runs it with
any set of optimisations; `reference.py` computes the expected result of every cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from patchscope_nn.backends import Backend, Local, PassResult, results_of, run_steps
from patchscope_nn.body.program import StepProgram
from patchscope_nn.lower import lower
from patchscope_nn.mappings import ResolvedMapping
from patchscope_nn.models import Model, Verdict, usable_memory
from patchscope_nn.plan import Optimisations, Plan, Step, plan
from patchscope_nn.proof.prompts import Numbers, as_text, random_ids
from patchscope_nn.readouts import Choices, Generate, Hidden, NextToken
from patchscope_nn.spec import RESIDUAL, Control, Cut, Patchscope, Readout, Site, Source, Target
from patchscope_nn.sweep import Cell, Sweep, expand

#: The number of tokens with which all target prompts of a trial begin, so that there is a prefix to share.
_PREFIX = 3
#: The number of top tokens that a next-token trial compares, and of tokens that a decoding trial decodes.
_COMPARED, DECODED = 24, 3
#: The lengths of the choices in tokens: the first needs a forward after the prompt, the second none.
CHOICE_LENGTHS = (3, 1)
#: The readouts of the trials; the texts of `CHOICES` are columns of the trials' rows.
NEXT_TOKEN, HIDDEN = NextToken(top_k=_COMPARED), Hidden(clean=True)
GENERATE, CHOICES = Generate(max_new_tokens=DECODED, relevancy=True), Choices(["{c0}", "{c1}"])

Context: TypeAlias = Literal["auto", "session"]
Results: TypeAlias = list[tuple[Cell, dict[str, Any]]]
_IDENTITY = ResolvedMapping(name="identity", kind="identity")


class Lengths(NamedTuple):
    """The lengths in tokens of a data row's prompts, and which of the random prompts of these lengths."""

    source: int
    target: int
    variant: int = 0


class Programs(NamedTuple):
    """A trial's plan, its steps, and the program of each."""

    planned: Plan
    steps: list[Step]
    programs: list[StepProgram]

    def rows(self, results: Iterator[Any]) -> list[dict[str, Any]]:
        """Convert the next results of steps to the raw readout of every cell, in the sweep's order."""
        passes = (result for step in self.steps for result in results_of(self.planned, step, next(results)))
        return [raw for _, raw in _in_order(self.planned, passes)]


def _in_order(planned: Plan, results: Iterable[PassResult]) -> Results:
    cells = [cell for result in results for cell in result.raw(planned.sweep)]
    return sorted(cells, key=lambda cell: cell[0].number)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A small sweep whose results are compared.

    Attributes:
        readout: The readout.
        rows: The prompts of each data row.
        layers: l.
        target_layers: l*; `same` pairs it with l.
        sites: The sites that are read and written.
        cuts: True to cut attention to a later token instead of writing a state. The run then equals a run
            without a patch.
        eos: The token that ends decoded texts; None if there is none.
    """

    readout: Readout
    rows: tuple[Lengths, ...]
    layers: tuple[int, ...]
    target_layers: tuple[int, ...] | Literal["same"] = "same"
    sites: tuple[Site, Site] = (RESIDUAL, RESIDUAL)
    cuts: bool = False
    eos: int | None = None

    @property
    def name(self) -> str:
        """The name of the readout, and of the sites unless both are the residual stream."""
        read, written = self.sites
        sites = "" if read == written == RESIDUAL else f", {read.name} to {written.name}"
        return f"{self.readout.name}{sites}{', attention mask' if self.cuts else ''}"

    @property
    def tokens(self) -> int:
        """The length of the longest prompt, appended tokens included."""
        more = max(CHOICE_LENGTHS) if self.readout.appends else self.readout.decoded
        return max(max(row.source, row.target + more) for row in self.rows)


@contextmanager
def _endless(module: Any) -> Iterator[None]:
    """While active, a model has no end token, so that generated texts always reach their full length."""
    config: Any = getattr(module, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        yield
        return
    config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = ends


class Runner:
    """Runs trials of one model through the compiler.

    Attributes:
        model: The model.
        verdict: The verdict so far, which limits the length of packed passes.
        backend: Where it runs.
    """

    def __init__(self, model: Model, backend: Backend | None = None) -> None:
        self.model, self.verdict = model, Verdict(key="")
        self.backend = backend or Local()
        self.memory = usable_memory(model.info)
        self.ids = {name: random_ids(model, 64, seed=seed) for seed, name in enumerate("st")}

    def source_prompt(self, row: Lengths) -> list[int]:
        """Return a random prompt."""
        return random_ids(self.model, row.source, seed=-row.source, variant=row.variant)

    def target_prompt(self, row: Lengths) -> list[int]:
        """Return a random prompt, with the prefix that all target prompts share."""
        ids = random_ids(self.model, row.target, seed=row.target, variant=row.variant)
        return [*self.ids["t"][:_PREFIX], *ids[_PREFIX:]]

    def row(self, lengths: Lengths) -> dict[str, str]:
        """Return a data row of a trial: its prompts and its choices, as texts of token ids."""
        columns = {f"c{number}": self.ids["s"][-count:] for number, count in enumerate(CHOICE_LENGTHS)}
        columns |= {"s": self.source_prompt(lengths), "t": self.target_prompt(lengths)}
        return {name: as_text(ids) for name, ids in columns.items()}

    def run(self, trial: Trial, used: Optimisations, *, context: Context = "session") -> Results:
        """Run a trial; return the raw readout of every cell, in the sweep's order."""
        model = self._model(trial.eos)
        return self._run(self._sweep(trial, model), model, used, context=context)

    def run_scope(
        self, scope: Patchscope, rows: Sequence[Mapping[str, str]], controls: Sequence[Control]
    ) -> Results:
        """Run a Patchscope whose prompts are texts of token ids; the result is as of `run`."""
        model = self._model(None)
        sweep = expand(scope, rows=rows, source=model, target=model, controls=controls)
        return self._run(sweep, model, Optimisations(), context="session")

    def _run(self, sweep: Sweep, model: Model, used: Optimisations, *, context: Context) -> Results:
        planned = plan(sweep, context=context, memory=self.memory, optimisations=used)
        with _endless(model.module):
            steps = run_steps(planned, source=model, target=model, mapping=_IDENTITY, backend=self.backend)
            return _in_order(planned, (result for step in steps for result in step))

    def programs(self, trial: Trial, used: Optimisations) -> Programs:
        """Return the programs of a trial's steps, to run on another machine."""
        model = self._model(trial.eos)
        planned = plan(self._sweep(trial, model), context="session", remote=True, optimisations=used)
        steps = [*planned.steps()]
        with _endless(model.module):
            programs = [lower(planned, step, source=model, target=model, mapping=_IDENTITY) for step in steps]
        return Programs(planned, steps, programs)

    def _model(self, eos: int | None) -> Model:
        info = replace(self.model.info, verdict=self.verdict)
        tokenizer = Numbers(len(self.model.tokenizer), eos=eos)
        return replace(self.model, info=info, tokenizer=tokenizer)

    def _sweep(self, trial: Trial, model: Model) -> Sweep:
        read, written = (site.name for site in trial.sites)
        source = Source(prompt="{s}", layer=trial.layers, site=read)
        write: Any = ("cut", Cut(position=-1)) if trial.cuts else "replace"
        target = Target(prompt="{t}", position=-2, layer=trial.target_layers, site=written, write=write)
        scope = Patchscope(source=source, target=target, readout=trial.readout)
        return expand(scope, rows=[self.row(row) for row in trial.rows], source=model, target=model)

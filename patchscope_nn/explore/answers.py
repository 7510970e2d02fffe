"""What the page asks, run through the library's own calls and told of as it runs. Runs in the worker."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from patchscope_nn.backends import Local
from patchscope_nn.errors import RunError
from patchscope_nn.explore.copies import Options
from patchscope_nn.explore.lenses import Lens
from patchscope_nn.explore.views import STOP, WINDOW, CellView, GridView, View
from patchscope_nn.explore.worker import Ask
from patchscope_nn.models import Model
from patchscope_nn.readouts.generate import cut
from patchscope_nn.recipe import Recipe
from patchscope_nn.runs.execute import Execution, execute
from patchscope_nn.runs.loading import load_models
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.runs.prepared import PreparedRun
from patchscope_nn.spec.prompts import decode, encode

#: How many pairs of models are kept; one that comes again after so many others is loaded again.
_PAIRS_KEPT = 2
#: The most cells of a pass in this process: small enough to tell of progress, and to be left between two.
_ROWS = 128


class Answers:
    """The models, and the answers they give.

    Args:
        lenses: The lenses, by name.
        options: Where and how models run.
    """

    def __init__(self, lenses: Mapping[str, Lens], options: Options) -> None:
        self.lenses, self.options, self.places = lenses, options, options.places()
        self._pairs: OrderedDict[tuple[str, str], tuple[Model, Model]] = OrderedDict()

    def load(self, source: str, target: str) -> tuple[Model, Model]:
        """M and M*, which are kept for the next request.

        Raises:
            InputError: One cannot be loaded.
        """
        if (source, target) not in self._pairs:
            known = {model.info.name: model for pair in self._pairs.values() for model in pair}
            # In two places one model is two; then neither stands for the other.
            known = known if self.places.source == self.places.target else {}
            while len(self._pairs) >= _PAIRS_KEPT:
                self._pairs.popitem(last=False)
            self._pairs[source, target] = load_models(
                source_model=known.get(source, source),
                target_model=known.get(target, target),
                places=self.places,
            )
        self._pairs.move_to_end((source, target))
        return self._pairs[source, target]

    @property
    def _here(self) -> bool:
        """True if M* runs in this process."""
        return isinstance(self.places.target, Local)

    def warm_up(self, source: str, target: str) -> None:
        """Do a little of everything, so that the first to ask does not wait for what is done once.

        What is wrong is told when somebody asks. On a server there is nothing to be done once.
        """
        if not self._here:
            return
        names: dict[str, Any] = {"prompt": "a b", "source_model": source, "target_model": target}
        cell = CellView(**names, position=0, layer=0, max_new_tokens=1)
        Ask(lambda ask: self.grid(GridView(**names), ask), lambda _: None).run()
        Ask(lambda ask: self.cell(cell, ask), lambda _: None).run()

    def grid(self, view: GridView, ask: Ask) -> None:
        """Read a grid, and tell it whole as `grid`."""
        source, target = self._models(view, ask)
        prompt = encode(view.prompt, source.tokenizer, field="source.prompt")
        count = len(prompt.ids)
        if view.positions is None and count > WINDOW:
            view = view.model_copy(update={"positions": tuple(range(WINDOW))})
        recipe = view.recipe(self.lenses)
        prepared = self._prepare(recipe, source, target)
        rows = _whole(self._run(prepared, ask, _Progress(ask, len(prepared.sweep.cells))))
        cells = [
            {name: row[name] for name in ("top_tokens", "top_probs", "entropy_nats", "surprisal_nats")}
            | {"position": row["source_position"][0], "layer": row["source_layer"]}
            | {"target_layer": row["target_layer"], "hit": _is_hit(row)}
            for row in rows
        ]
        ask.tell(
            "grid",
            n_tokens=count,
            positions=list(range(count) if view.positions is None else view.positions),
            whole=view.positions is None,
            tokens=list(prompt.tokens),
            n_layers=source.info.n_layers,
            target_layers=target.info.n_layers,
            cells=cells,
        )

    def cell(self, view: CellView, ask: Ask) -> None:
        """Ask what a state is: `text` as it is decoded, then each cell's row as `said`."""
        source, target = self._models(view, ask)
        prepared = self._prepare(view.recipe(), source, target)
        rows = self._run(prepared, ask, _Telling(ask, prepared))
        for row in _whole(rows):
            names = ("control", "text", "stopped", "source_token", "target_token", "target_position")
            ask.tell("said", **{name: row[name] for name in names}, target_layer=row["target_layer"])

    def _models(self, view: View, ask: Ask) -> tuple[Model, Model]:
        if (view.source_model, view.target_model) not in self._pairs:
            names = dict.fromkeys((view.source_model, view.target_model))
            ask.tell("loading", models=list(names))
        return self.load(view.source_model, view.target_model)

    def _prepare(self, recipe: Recipe, source: Model, target: Model) -> PreparedRun:
        return prepare(recipe, places=self.places, source_model=source, target_model=target).only

    def _run(self, prepared: PreparedRun, ask: Ask, listener: Any) -> Sequence[Mapping[str, Any]]:
        execution = Execution(
            max_rows=_ROWS if self._here else None,
            progress=lambda done, total: ask.tell("progress", done=done, total=total),
            notice=lambda line: ask.tell("notice", line=line),
            listener=listener,
        )
        return execute(prepared, execution).rows


class _Progress:
    """Tells how many cells have been read."""

    def __init__(self, ask: Ask, total: int) -> None:
        self.ask, self.total, self.done = ask, total, 0

    def read(self, count: int) -> None:
        """Count the cells of a pass."""
        self.done += count
        self.ask.tell("progress", done=self.done, total=self.total)

    def decoded(self, cell: int, ids: Sequence[int]) -> None:
        """A grid decodes nothing."""


class _Telling:
    """Tells each cell's text as it grows, under its control's name."""

    def __init__(self, ask: Ask, prepared: PreparedRun) -> None:
        self.ask, self.sweep, self.tokenizer = ask, prepared.sweep, prepared.target.tokenizer

    def read(self, count: int) -> None:
        """The prompts have been read; the first tokens come next."""
        self.ask.tell("read", cells=count)

    def decoded(self, cell: int, ids: Sequence[int]) -> None:
        """Tell the text so far."""
        text = cut(decode(list(ids), self.tokenizer), STOP)
        control = self.sweep.cells[cell].control
        self.ask.tell("text", control=control, text=text, n_tokens=len(ids))


def _whole(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Rows that the page can show.

    Raises:
        RunError: Some have no result.
    """
    failed = [row["error"] for row in rows if row["error"] is not None]
    if failed:
        raise RunError(f"{len(failed)} of {len(rows)} cells have no result. The first: {failed[0]}")
    return rows


def _is_hit(row: Mapping[str, Any]) -> bool | None:
    """Whether the top token is the one that M itself says next; None where that is not compared."""
    if row["reference_ids"] is None:
        return None
    return bool(row["top_ids"][0] == row["reference_ids"][0])

"""Answer the page's requests with the library's calls, and report progress. Runs in the worker thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from patchscope_nn.backends import Local
from patchscope_nn.errors import RunError
from patchscope_nn.explore.copies import Options
from patchscope_nn.explore.lenses import Lens
from patchscope_nn.explore.views import STOP, WINDOW, CellView, GridView, View
from patchscope_nn.explore.worker import Query
from patchscope_nn.models import Model
from patchscope_nn.readouts.generate import cut
from patchscope_nn.runs.execute import Execution, execute
from patchscope_nn.runs.loading import load_models
from patchscope_nn.runs.prepare import prepare
from patchscope_nn.runs.prepared import PreparedRun
from patchscope_nn.spec.encoding import decode, encode

#: The number of pairs of models that stay loaded.
_PAIRS_KEPT = 2
#: The number of cells of a pass in this process; progress and cancelling happen between passes.
_ROWS = 128


class Answers:
    """Loads models and answers requests with them."""

    def __init__(self, lenses: Mapping[str, Lens], options: Options) -> None:
        self.lenses, self.options, self.places = lenses, options, options.places()
        self._pairs: OrderedDict[tuple[str, str], tuple[Model, Model]] = OrderedDict()

    def load(self, source: str, target: str) -> tuple[Model, Model]:
        """Return M and M*, loaded now or for an earlier request; InputError if a model cannot be loaded."""
        if (source, target) not in self._pairs:
            known = {model.info.name: model for pair in self._pairs.values() for model in pair}
            # If source and target run in different places, the same name means two different objects.
            known = known if self.places.source == self.places.target else {}
            while len(self._pairs) >= _PAIRS_KEPT:
                self._pairs.popitem(last=False)
            m, m_star = known.get(source, source), known.get(target, target)
            pair = load_models(source_model=m, target_model=m_star, places=self.places)
            self._pairs[source, target] = pair
        self._pairs.move_to_end((source, target))
        return self._pairs[source, target]

    def warm_up(self, source: str, target: str) -> None:
        """Run a small grid and a small cell, so that the first request does not wait for one-time work.

        Errors are ignored here, because the first request reports them. A server needs no such work.
        """
        if not isinstance(self.places.target, Local):
            return
        names: dict[str, Any] = {"prompt": "a b", "source_model": source, "target_model": target}
        cell = CellView(**names, position=0, layer=0, max_new_tokens=1)
        Query(lambda query: self.grid(GridView(**names), query), lambda _: None).run()
        Query(lambda query: self.cell(cell, query), lambda _: None).run()

    def grid(self, view: GridView, query: Query) -> None:
        """Read a grid, and report all its cells in one event, `grid`."""
        source, target = self._models(view, query)
        prompt = encode(view.prompt, source.tokenizer, field="source.prompt")
        count = len(prompt.ids)
        if view.positions is None and count > WINDOW:
            view = view.model_copy(update={"positions": tuple(range(WINDOW))})
        recipe = view.recipe(self.lenses)
        prepared = prepare(recipe, places=self.places, source_model=source, target_model=target).only
        rows = _checked(self._run(prepared, query, _GridListener(query, len(prepared.sweep.cells))))
        cells = [
            {name: row[name] for name in ("top_tokens", "top_probs", "entropy_nats", "surprisal_nats")}
            | {"position": row["source_position"][0], "layer": row["source_layer"]}
            | {"target_layer": row["target_layer"], "hit": _is_hit(row)}
            for row in rows
        ]
        query.report(
            "grid",
            n_tokens=count,
            positions=list(range(count) if view.positions is None else view.positions),
            whole=view.positions is None,
            tokens=list(prompt.tokens),
            n_layers=source.info.n_layers,
            target_layers=target.info.n_layers,
            cells=cells,
        )

    def cell(self, view: CellView, query: Query) -> None:
        """Describe a state: report `text` while it is decoded, then an `answer` for each cell."""
        source, target = self._models(view, query)
        prepared = prepare(view.recipe(), places=self.places, source_model=source, target_model=target).only
        rows = self._run(prepared, query, _CellListener(query, prepared))
        for row in _checked(rows):
            names = ("control", "text", "stopped", "source_token", "target_token", "target_position")
            query.report("answer", **{name: row[name] for name in names}, target_layer=row["target_layer"])

    def _models(self, view: View, query: Query) -> tuple[Model, Model]:
        names = view.source_model, view.target_model
        if names not in self._pairs:
            query.report("loading", models=list(dict.fromkeys(names)))
        return self.load(*names)

    def _run(self, prepared: PreparedRun, query: Query, listener: Any) -> Sequence[Mapping[str, Any]]:
        execution = Execution(
            max_rows=_ROWS if isinstance(self.places.target, Local) else None,
            progress=lambda done, total: query.report("progress", done=done, total=total),
            notice=lambda line: query.report("notice", line=line),
            listener=listener,
        )
        return execute(prepared, execution).rows


class _GridListener:
    """Reports the number of cells that have been read."""

    def __init__(self, query: Query, total: int) -> None:
        self.query, self.total, self.done = query, total, 0

    def read(self, count: int) -> None:
        """Add the cells of a pass to the progress."""
        self.done += count
        self.query.report("progress", done=self.done, total=self.total)

    def decoded(self, cell: int, ids: Sequence[int]) -> None:
        """Do nothing; a grid decodes no text."""


class _CellListener:
    """Reports the text of each cell as it grows, with the name of its control."""

    def __init__(self, query: Query, prepared: PreparedRun) -> None:
        self.query, self.sweep, self.tokenizer = query, prepared.sweep, prepared.target.tokenizer

    def read(self, count: int) -> None:
        """Report that the prompts have been read and decoding begins."""
        self.query.report("read", cells=count)

    def decoded(self, cell: int, ids: Sequence[int]) -> None:
        """Report the text so far."""
        text = cut(decode(list(ids), self.tokenizer), STOP)
        control = self.sweep.cells[cell].control
        self.query.report("text", control=control, text=text, n_tokens=len(ids))


def _checked(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the rows if all have a result; raise RunError if some cells failed."""
    failed = [row["error"] for row in rows if row["error"] is not None]
    if failed:
        raise RunError(f"{len(failed)} of {len(rows)} cells failed. The first: {failed[0]}")
    return rows


def _is_hit(row: Mapping[str, Any]) -> bool | None:
    """True if the top token is also M's own next token; None if that is not compared."""
    reference = row["reference_ids"]
    return None if reference is None else bool(row["top_ids"][0] == reference[0])

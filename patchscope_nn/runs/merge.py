"""Joining runs into one: the shards of a run, or runs of one recipe over different data rows.

1. Check that the runs may be mixed, are finished, and together have each cell once.
2. Copy their parts into a draft folder, with the numbers that the cells have in the whole.
3. Write the manifest and the table there, move the draft to its place, and write the report.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchscope_nn._util.arguments import checked
from patchscope_nn._util.clocks import utc_now
from patchscope_nn._util.digests import digest
from patchscope_nn._util.plain import shown
from patchscope_nn.analysis.cell_rows import CELL, KEY, CellRows
from patchscope_nn.errors import FolderError, InputError
from patchscope_nn.runs.execute import with_probe, write_ensemble_and_report
from patchscope_nn.runs.experiments import Experiment, experiment_record, save_comparison
from patchscope_nn.runs.folder import write_finished, write_probe_columns
from patchscope_nn.runs.identity import check_same, joined
from patchscope_nn.runs.manifest import Manifest, read_manifest, with_probe_columns
from patchscope_nn.runs.parts import CELLS, Parts, read_parts, renumbered, write_numbers
from patchscope_nn.runs.results import Run, load_run
from patchscope_nn.runs.shards import Shard

#: Fields of recipes that may differ: what names a run, and its data.
_MAY_DIFFER = ("name", "title", "paper", "model", "data")


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One of the runs to join."""

    folder: Path
    manifest: Manifest
    parts: Parts

    @property
    def shard(self) -> Shard | None:
        return Shard.of(self.manifest.get("shard"))

    def column(self, name: str) -> Any:
        """A column of the finished cells, of all parts."""
        kept = (part[name].to_numpy()[part[CELL].to_numpy() >= 0] for part in self.parts.values())
        return np.concatenate([np.empty(0, np.int64), *kept]) if name != KEY else np.concatenate([*kept])


@checked
def merge(runs: Sequence[str | Path], *, out: str | Path, report: bool = True) -> Run | Experiment:
    """Join finished runs into one: all shards of a run, or runs of one recipe over different data rows.

    Args:
        runs: The folders of the runs, or of experiments with the same methods.
        out: The folder of the whole, which must not exist yet. It is an ordinary run folder: the recipe can
            go on in it with more rows, layers, positions or controls.
        report: Whether to write the report; `Run.report` writes it later.

    Returns:
        The whole.

    Raises:
        InputError: A folder is not that of a run; a run is unfinished; the runs may not be mixed; a shard is
            missing; or a cell is in two of them.
    """
    folders, place = [Path(run) for run in runs], Path(out)
    if not folders:
        raise InputError("there are no runs to merge.", hint="Name the folders of all shards.")
    records = [experiment_record(folder) for folder in folders]
    with _draft(place) as draft:
        first = records[0]
        if first is None or None in records:
            _merge_runs([_piece(folder) for folder in folders], draft)
            first = None
        else:
            for record, folder in zip(records, folders, strict=True):
                if record is not None and record["folders"] != first["folders"]:
                    raise FolderError(
                        f"{folder} has the methods {', '.join(record['folders'])}, and {folders[0]} has "
                        f"{', '.join(first['folders'])}.",
                        hint="Merge runs of one recipe.",
                    )
            for name in first["folders"].values():
                _merge_runs([_piece(folder / name) for folder in folders], draft / name)
    if first is None:
        return _reported(place, report=report)
    methods = {name: _reported(place / folder, report=report) for name, folder in first["folders"].items()}
    experiment = Experiment(title=first["title"], runs=methods, path=place)
    save_comparison(experiment, place, report=report)
    return experiment


@contextmanager
def _draft(place: Path) -> Iterator[Path]:
    """Yield a folder beside `place` that takes its place if the block ends without an error."""
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise FolderError(f"{place} is not empty.", hint="Name a folder that does not exist yet.")
    draft = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        yield draft
        draft.replace(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _piece(folder: Path) -> _Piece:
    """Read one of the runs.

    Raises:
        FolderError: It is not the folder of a finished run.
    """
    piece = _Piece(folder=folder, manifest=read_manifest(folder), parts=read_parts(folder))
    n_cells, n_done = piece.manifest["n_cells"], len(piece.column(CELL))
    if piece.manifest["state"] != "finished" or n_done != n_cells:
        command = piece.manifest.get("command")
        again = f": {command}" if command else "."
        raise FolderError(
            f"{folder} is not finished: it has {n_done} of {n_cells} cells.",
            hint=f"Finish it first, by the command or call that began it{again}",
        )
    return piece


def _merge_runs(pieces: Sequence[_Piece], folder: Path) -> None:
    """Join runs in a new folder, up to the table; see `merge` for the errors."""
    first = pieces[0]
    for other in pieces[1:]:
        check_same(first.folder, first.manifest, other.manifest["identity"], hint=_leave_out(other))
    if any(piece.shard for piece in pieces):
        _check_shards(pieces)
    else:
        _check_recipes(pieces)
    _check_doubled(pieces)
    (folder / CELLS).mkdir(parents=True)
    parts: Parts = {}
    first_cell, first_row = 0, 0
    for piece in pieces:
        for number, part in piece.parts.items():
            shutil.copyfile(
                piece.folder / CELLS / f"{number:08d}.arrow", folder / CELLS / f"{len(parts):08d}.arrow"
            )
            cells, rows = part[CELL].to_numpy(), part["row"].to_numpy()
            parts[len(parts)] = renumbered(
                part, np.where(cells < 0, -1, cells + first_cell), np.where(cells < 0, -1, rows + first_row)
            )
        if piece.shard is None:
            first_cell, first_row = (
                first_cell + piece.manifest["n_cells"],
                first_row + piece.manifest["n_rows"],
            )
    write_numbers(folder, parts)
    rows = CellRows([*parts.values()])
    manifest = _manifest(pieces, n_cells=len(rows), n_rows=len({*rows.column("row")}))
    recipe = manifest["recipe"]
    keep = partial(write_probe_columns, folder, recipe["probe"], manifest["hash"])
    rows = with_probe(rows, recipe, first.manifest.get("probe_rows"), keep=keep)
    write_finished(folder, rows, manifest)


def _leave_out(piece: _Piece) -> str:
    return f"Leave {piece.folder} out, or merge it with runs like it."


def _check_shards(pieces: Sequence[_Piece]) -> None:
    """Check that runs are all shards of one run.

    Raises:
        FolderError: One is not a shard, or is a shard of another run; one is missing, or there twice.
    """
    first = pieces[0]
    by_number: dict[int, _Piece] = {}
    for piece in pieces:
        if piece.shard is None or first.shard is None:
            whole, shard = (piece, first) if piece.shard is None else (first, piece)
            raise FolderError(
                f"{whole.folder} is a whole run, and {shard.folder} is shard {shard.shard} of one.",
                hint="Merge shards with shards. To add a run's cells to another, use patchscope run --reuse.",
            )
        hashes = [(each.manifest["hash"], each.shard.total) for each in (first, piece) if each.shard]
        if hashes[0] != hashes[1]:
            of_first, of_piece = (f"{total} shards of run {name}" for name, total in hashes)
            raise FolderError(
                f"{first.folder} is one of {of_first}, and {piece.folder} is one of {of_piece}.",
                hint="Shards belong together if recipe, data, limit and number of shards are the same.",
            )
        other = by_number.setdefault(piece.shard.number, piece)
        if other is not piece:
            raise FolderError(
                f"{other.folder} and {piece.folder} are both shard {piece.shard}.",
                hint="Leave one of them out.",
            )
    total = len(by_number) if first.shard is None else first.shard.total
    missing = [str(number) for number in range(1, total + 1) if number not in by_number]
    if missing:
        raise FolderError(
            f"{len(missing)} of {total} shards are missing: {', '.join(missing)}.",
            hint="Run them with --shard, and name their folders too.",
        )


def _check_recipes(pieces: Sequence[_Piece]) -> None:
    """Check that whole runs differ only in their data.

    Raises:
        FolderError: They have other layers, positions or controls, or a probe.
    """
    first = pieces[0]
    if len(pieces) == 1:
        raise FolderError(f"{first.folder} is a single whole run.", hint="Name two or more runs.")
    for piece in pieces[1:]:
        for name, value in first.manifest["recipe"].items():
            other = piece.manifest["recipe"].get(name)
            if name not in _MAY_DIFFER and value != other:
                raise FolderError(
                    f"{first.folder} and {piece.folder} are runs with different {name}: {shown(value)} and "
                    f"{shown(other)}.",
                    hint="Only shards, or runs over different data rows, can be merged. Run the recipe that "
                    "has all their cells in another folder, with --reuse for each.",
                )
        if first.manifest["recipe"]["probe"]:
            raise FolderError(
                f"the recipe of {first.folder} has a probe, which is trained on the data rows of all runs.",
                hint="Run it over all data rows in another folder, with --reuse for each of these.",
            )


def _check_doubled(pieces: Sequence[_Piece]) -> None:
    """Check that no cell is in two runs.

    Raises:
        FolderError: A cell is; the message names both runs.
    """
    keys = [piece.column(KEY) for piece in pieces]
    every, of = np.concatenate(keys), np.repeat(np.arange(len(pieces)), [*map(len, keys)])
    order = np.argsort(every, kind="stable")
    twice = np.flatnonzero(every[order][1:] == every[order][:-1])
    if len(twice):
        one, other = (pieces[of[order[twice[0] + step]]].folder for step in (0, 1))
        raise FolderError(
            f"{len(twice)} cells are in two of the runs, the first of them in {one} and {other}.",
            hint="Leave one of the two out, or run the recipe in another folder, with --reuse for each.",
        )


def _manifest(pieces: Sequence[_Piece], *, n_cells: int, n_rows: int) -> Manifest:
    """Build the manifest of the whole."""
    manifests = [piece.manifest for piece in pieces]
    merged = {name: value for name, value in manifests[0].items() if name not in ("shard", "probe_rows")}
    if pieces[0].shard is None:
        merged |= {name: digest([each[name] for each in manifests]) for name in ("hash", "data_hash")}
        if any(each["recipe"]["data"] != merged["recipe"]["data"] for each in manifests):
            merged["recipe"] = {**merged["recipe"], "data": None}
        if sum(each.get("n_dropped", 0) for each in manifests):
            merged["n_dropped"] = sum(each.get("n_dropped", 0) for each in manifests)
    for each in manifests:
        merged["identity"] = joined(merged["identity"], each["identity"])
    sessions = [
        {**session, "run": str(piece.folder)} for piece in pieces for session in piece.manifest["sessions"]
    ]
    elapsed = sum(session["elapsed_s"] for session in sessions)
    return merged | {
        "created": utc_now(),
        "command": None,
        "n_cells": n_cells,
        "n_rows": n_rows,
        "columns": with_probe_columns(merged["columns"])
        if "probe_rows" in manifests[0]
        else merged["columns"],
        "sessions": sessions,
        "timings": {"elapsed_s": round(elapsed, 3)},
        "merged": [
            {name: piece.manifest[name] for name in ("hash", "shard", "n_cells") if name in piece.manifest}
            | {"folder": str(piece.folder)}
            for piece in pieces
        ],
    }


def _reported(folder: Path, *, report: bool) -> Run:
    """Write the report of a merged run, if it is wanted, and return the run."""
    run = load_run(folder)
    write_ensemble_and_report(run, report=report)
    return run

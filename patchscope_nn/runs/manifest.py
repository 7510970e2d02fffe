"""The contents of `manifest.json`: what ran, with which models and packages, where, and for how long."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from patchscope_nn._util.clocks import utc_now
from patchscope_nn._util.files import write_whole
from patchscope_nn._util.versions import recorded_versions
from patchscope_nn.analysis.probes import PROBE_COLUMNS
from patchscope_nn.analysis.tables import columns_of
from patchscope_nn.backends import Backend
from patchscope_nn.errors import FolderError
from patchscope_nn.metrics import dump_infos, references
from patchscope_nn.models import ModelInfo
from patchscope_nn.plan import Plan
from patchscope_nn.runs.identity import joined
from patchscope_nn.runs.prepared import PreparedRun

MANIFEST = "manifest.json"
Manifest = dict[str, Any]


def new_manifest(prepared: PreparedRun, planned: Plan, *, command: str | None) -> Manifest:
    """Build the manifest of a new run.

    Args:
        prepared: The run.
        planned: The plan of all its cells.
        command: The command line, if the run was started by one.
    """
    sweep, mapping = prepared.sweep, prepared.mapping
    return {
        "recipe": prepared.recipe,
        "references": references(prepared.metrics, sweep.rows),
        "hash": prepared.digest,
        "data_hash": prepared.data_hash,
        "command": command,
        "created": utc_now(),
        "state": "running",
        "n_rows": len(sweep.rows),
        **({"n_dropped": prepared.n_dropped} if prepared.n_dropped else {}),
        "n_cells": len(prepared.cells),
        "columns": _columns(prepared),
        "derived": {use.name: use.column.kind for use in prepared.columns if use.column is not None},
        "metrics": dump_infos(prepared.metrics, readout=sweep.scope.readout.name),
        "models": {"source": _model(sweep.source), "target": _model(sweep.target)},
        "mapping": {
            "name": mapping.name,
            "weights": mapping.digest,
            **({"fit": mapping.about} if mapping.about else {}),
            **({"notices": list(mapping.notices)} if mapping.notices else {}),
        },
        **({"notices": list(sweep.notices)} if sweep.notices else {}),
        "seed": prepared.recipe["seed"],
        "backend": prepared.places.backend.name,
        "plan": {"digest": planned.digest, "withheld": [str(entry) for entry in planned.withheld]},
        "sessions": [],
        "timings": {"elapsed_s": 0.0},
        **_shard(prepared),
    }


def _columns(prepared: PreparedRun) -> list[str]:
    columns = columns_of(prepared.sweep.scope.readout, prepared.metrics, prepared.columns)
    return with_probe_columns(columns) if prepared.recipe["probe"] and not prepared.shard else columns


def with_probe_columns(columns: Sequence[str]) -> list[str]:
    """Return the names of a run's columns with those of a probe."""
    *others, error = columns
    return [*others, *PROBE_COLUMNS, error]


def _shard(prepared: PreparedRun) -> Manifest:
    """Return what differs in the manifest of a shard: a probe is trained when all shards are merged."""
    if prepared.shard is None:
        return {}
    probe = {"labels": prepared.labels, "prompts": prepared.source_prompts}
    return {
        "shard": str(prepared.shard),
        "n_rows": len(np.unique(prepared.index.rows(np.array(prepared.cells)))),
        **({"probe_rows": probe} if prepared.recipe["probe"] else {}),
    }


def _model(info: ModelInfo) -> dict[str, Any]:
    omitted = ("architecture", "verdict")
    fields = {name: value for name, value in asdict(info).items() if name not in omitted}
    return fields | {"proof": "skipped" if info.verdict is None else info.verdict.summary()}


def new_session(
    backend: Backend, *, n_cells: int, elapsed_s: float, taken: Mapping[str, int] = {}
) -> dict[str, Any]:
    """Build the record of a session that has just ended.

    Args:
        backend: Where it ran.
        n_cells: The number of cells that it computed.
        elapsed_s: How long it took.
        taken: The number of cells that it took from each folder of another run.
    """
    return {
        "ended": utc_now(),
        "cells": n_cells,
        **({"reused": dict(taken)} if taken else {}),
        "elapsed_s": round(elapsed_s, 3),
        "backend": backend.name,
        "platform": platform.platform(),
        "versions": recorded_versions(),
    }


def finished_manifest(manifest: Manifest, session: dict[str, Any]) -> Manifest:
    """Build the manifest of a finished run. A last session without cells changes nothing."""
    if manifest["state"] == "finished" and not session["cells"]:
        return manifest
    sessions = [*manifest["sessions"], session]
    elapsed = sum(entry["elapsed_s"] for entry in sessions)
    return {
        **manifest,
        "state": "finished",
        "sessions": sessions,
        "versions": session["versions"],
        "timings": {"elapsed_s": round(elapsed, 3)},
    }


def grown_manifest(manifest: Manifest, earlier: Manifest) -> Manifest:
    """Build the manifest of a run that goes on in a folder: `earlier` itself, unless the run has grown.

    Args:
        manifest: The run's own manifest.
        earlier: The folder's.
    """
    if manifest["hash"] == earlier["hash"] and manifest.get("shard") == earlier.get("shard"):
        return earlier
    history = {
        name: earlier[name] for name in ("created", "sessions", "timings", "merged") if name in earlier
    }
    return manifest | history | {"identity": joined(earlier["identity"], manifest["identity"])}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a run folder's manifest atomically."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run folder.

    Raises:
        FolderError: The folder has none, or it cannot be read.
    """
    file = folder / MANIFEST
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FolderError(
            f"{folder} is not the folder of a run: it has no {MANIFEST}.",
            hint="`patchscope run` prints the folder of its run.",
        ) from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{file} cannot be read: {error}.") from error

"""Taking finished cells from the folders of other runs, instead of computing them again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from patchscope_nn.analysis.cell_rows import CELL, KEY
from patchscope_nn.errors import FolderError
from patchscope_nn.recipe import slug
from patchscope_nn.runs.folder import InMemory, located
from patchscope_nn.runs.identity import check_same, identity
from patchscope_nn.runs.manifest import MANIFEST, read_manifest
from patchscope_nn.runs.parts import read_parts
from patchscope_nn.runs.prepared import PreparedRun


def take_cells(folders: Sequence[Path], prepared: PreparedRun, store: InMemory) -> dict[str, int]:
    """Copy the finished cells of other runs that a run still lacks.

    Args:
        folders: The folders of the other runs, finished or not. A cell is taken from the first that has it.
        prepared: The run.
        store: Where its finished cells are kept.

    Returns:
        The number of cells taken from each folder.

    Raises:
        FolderError: A folder is not that of a run, or its cells may not be mixed with this run's.
    """
    taken = {}
    for folder in folders:
        own = store.manifest["identity"] if store.manifest else identity(prepared)
        check_same(folder, read_manifest(folder), own, hint="Leave it out of --reuse.")
        before = store.n_done
        for part in read_parts(folder).values():
            present = located(part, prepared)
            cells = present[CELL].to_numpy()
            wanted = np.flatnonzero((cells >= 0) & ~store.done[cells])
            wanted = wanted[np.argsort(cells[wanted])]
            if len(wanted):
                store.append(present.take(pa.array(wanted)).drop_columns([KEY]))
        taken[str(folder)] = store.n_done - before
    return taken


def folders_of(method: str, folders: Sequence[Path], *, methods: Sequence[str]) -> tuple[Path, ...]:
    """Return the folders from which one method of an experiment may take cells.

    Args:
        method: The method.
        folders: The folders of other experiments.
        methods: All methods.

    Raises:
        FolderError: A folder has none of the methods.
    """
    for folder in folders:
        if not any((folder / slug(name) / MANIFEST).exists() for name in methods):
            raise FolderError(
                f"{folder} has no folder of a method of this recipe: {', '.join(map(slug, methods))}.",
                hint="Give --reuse the folder of a run of this recipe.",
            )
    own = [folder / slug(method) for folder in folders]
    return tuple(folder for folder in own if (folder / MANIFEST).exists())

"""The readout `hidden`: the state that was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from patchscope_nn.spec import ColumnType, PassCells, Readout


class Hidden(Readout):
    """Readout: the written state, f(h), at (i*, l*) of T.

    Its column is `hidden`, a list of (d_model,) vectors, one for each patched token.
    """

    name = "hidden"
    body = "patchscope_nn.body.readouts:read_hidden"
    columns: ClassVar[Mapping[str, ColumnType]] = {"hidden": "states", "clean": "states"}
    unembeds = False
    proven = True
    action = "the written states were kept"

    clean: bool = False
    """Add the column `clean`, the states that were replaced."""

    @property
    def looks_at_replaced(self) -> bool:
        """True if the replaced states are read too."""
        return self.clean

    @property
    def given(self) -> tuple[str, ...]:
        """The columns of the written states and, with `clean`, of the replaced states."""
        return ("hidden", "clean") if self.clean else ("hidden",)

    def lower(self, cells: PassCells) -> dict[str, Any]:  # noqa: ARG002 (nothing is looked up)
        """Return the arguments of `read_hidden`."""
        return {"clean": self.clean}

"""The state that was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from patchscope_nn.spec import ColumnType, PassCells, Readout


class Hidden(Readout):
    """Readout: the state that was written, f(h), as it stands at (i*, l*) of T.

    Gives `hidden`, a list of (d_model,) vectors, one for each patched token.

    Attributes:
        clean: Give also `clean`, the states that were there.
    """

    name: ClassVar[str] = "hidden"
    body: ClassVar[str] = "patchscope_nn.body.readouts:read_hidden"
    columns: ClassVar[Mapping[str, ColumnType]] = {"hidden": "states", "clean": "states"}
    unembeds: ClassVar[bool] = False
    proven: ClassVar[bool] = True
    action: ClassVar[str] = "the written states were kept"

    clean: bool = False

    @property
    def looks_at_replaced(self) -> bool:
        """True if the replaced states are given too."""
        return self.clean

    @property
    def given(self) -> tuple[str, ...]:
        """The states, and where they are asked for those that were there."""
        return ("hidden", "clean") if self.clean else ("hidden",)

    def lower(self, cells: PassCells) -> dict[str, Any]:  # noqa: ARG002 (nothing is looked up)
        """What `read_hidden` takes."""
        return {"clean": self.clean}

"""Numbers for what source passes read: hidden states, and next-token distributions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from patchscope_nn._util.ragged import Ints
from patchscope_nn.sweep.cell import Flags


class StateNumbers(NamedTuple):
    """Numbers the states of a model, in one array: by origin (`Cells.origins`), then by layer.

    The hidden states of an origin come first, from the input of block 0 on, and then the next-token
    distribution after the last of its positions.

    Attributes:
        n_layers: The number of blocks.
    """

    n_layers: int

    def hidden(self, origin: Ints, layer: Ints) -> Ints:
        """Return the numbers of hidden states; layer -1 is the input of block 0."""
        return origin * (self.n_layers + 2) + layer + 1

    def final(self, origin: Ints) -> Ints:
        """Return the numbers of next-token distributions."""
        return self.hidden(origin, np.array(self.n_layers))

    def origin(self, states: Ints) -> Ints:
        """Return the origin of each state."""
        return states // (self.n_layers + 2)

    def layer(self, states: Ints) -> Ints:
        """Return the layer of each state; `n_layers` for a distribution."""
        return states % (self.n_layers + 2) - 1

    def is_final(self, states: Ints) -> Flags:
        """Return whether each state is a next-token distribution."""
        return self.layer(states) == self.n_layers

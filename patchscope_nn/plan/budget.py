"""How much a forward pass may hold: rows, and bytes of activations, keys and values, and logits.

The bytes are a generous estimate from the model's sizes, at the point where a pass holds most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from patchscope_nn._util.ragged import Ints
from patchscope_nn.models import ModelInfo

MAX_ROWS = 1024
#: The default budget in bytes, if the free memory has not been measured.
MEMORY = 2**31
#: The attention of a packed sequence grows with the square of its tokens, unless tokens attend to the shared
#: prefix separately. On a CPU, matrix products gain little beyond 256 tokens; on a GPU they gain more.
_SEQUENCE_CPU, _SEQUENCE_SHARED, _SEQUENCE_GPU = 256, 1024, 2048
_FLOAT = 4

#: A number, or an array of them.
_N = TypeVar("_N", int, Ints)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a forward pass may hold. A single cell may need more memory, since it has to run.

    Attributes:
        max_rows: The most cells.
        memory: The most bytes.
    """

    max_rows: int = MAX_ROWS
    memory: int = MEMORY

    def halved(self, rows: int) -> Budget:
        """Return half of the budget, after a pass of `rows` rows ran out of memory."""
        return replace(self, max_rows=max(1, min(self.max_rows, rows) // 2), memory=max(1, self.memory // 2))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The memory that parts of a forward pass of one model take, in bytes; for one pass, or several."""

    info: ModelInfo

    def longest_sequence(self, *, shared_attention: bool) -> int:
        """Return the most tokens that are worth packing into one sequence."""
        if self.info.device != "cpu":
            return _SEQUENCE_GPU
        return _SEQUENCE_SHARED if shared_attention else _SEQUENCE_CPU

    def running(self, tokens: _N) -> _N:
        """Return the bytes of the activations of tokens that go through a block."""
        sizes = self.info.sizes
        widths = 6 * self.info.d_model + 3 * sizes.attention + sizes.cache + 3 * sizes.widest
        return tokens * widths * self.info.bytes_per_number

    def cached(self, tokens: _N) -> _N:
        """Return the bytes of the keys and values of tokens, in all blocks."""
        return tokens * self.info.n_layers * self.info.sizes.cache * self.info.bytes_per_number

    def read(self, rows: _N) -> _N:
        """Return the bytes of the logits of rows, and of the float32 tensors a readout computes from them."""
        return rows * self.info.vocab_size * (self.info.bytes_per_number + 3 * _FLOAT)

    def packed(self, tokens: _N, prefix: int, rows: _N) -> _N:
        """Return the bytes of a packed sequence of tokens after a prefix, of which `rows` are read."""
        mask = tokens * (prefix + tokens) * (self.info.bytes_per_number + 1)
        return self.running(tokens) + self.cached(tokens + prefix) + self.read(rows) + mask

    def batch(self, rows: _N, width: _N, *, read: _N, decodes: bool) -> _N:
        """Return the bytes of a padded batch that reads `read` positions of each row.

        If decoding continues from it, keys and values are kept, and copied when rows leave the batch.
        """
        tokens = rows * width
        return self.running(tokens) + self.read(rows * read) + 2 * decodes * self.cached(tokens)

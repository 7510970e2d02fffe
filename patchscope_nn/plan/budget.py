"""How much a forward pass may hold: rows, and bytes of activations, keys and values, and logits.

The bytes are reckoned from the model's sizes, on the generous side: what a pass holds at its widest place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from patchscope_nn.models import ModelInfo

MAX_ROWS = 1024
#: A budget for planning where nobody has looked how much memory there is, in bytes.
MEMORY = 2**31
#: A packed sequence's attention grows with the square of its tokens, where cells do not attend to what they
#: share apart from what is their own. A CPU's matrix products gain little beyond 256 tokens, a GPU's more.
_SEQUENCE_CPU, _SEQUENCE_SHARED, _SEQUENCE_GPU = 256, 1024, 2048
_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a forward pass may hold; a single cell may be larger, since it has to run.

    Attributes:
        max_rows: The most cells.
        memory: The most bytes.
    """

    max_rows: int = MAX_ROWS
    memory: int = MEMORY

    def halved(self, rows: int) -> Budget:
        """Half of it, for passes that held `rows` rows and were too large."""
        return replace(self, max_rows=max(1, min(self.max_rows, rows) // 2), memory=max(1, self.memory // 2))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What things of one model take, in bytes."""

    info: ModelInfo

    def longest_sequence(self, *, shared_attention: bool) -> int:
        """The most tokens that are worth packing into one sequence."""
        if self.info.device != "cpu":
            return _SEQUENCE_GPU
        return _SEQUENCE_SHARED if shared_attention else _SEQUENCE_CPU

    def running(self, tokens: int) -> int:
        """The activations of tokens that go through a block."""
        sizes = self.info.sizes
        widths = 6 * self.info.d_model + 3 * sizes.attention + sizes.cache + 3 * sizes.widest
        return tokens * widths * self.info.bytes_per_number

    def cached(self, tokens: int) -> int:
        """The keys and values of tokens, in all blocks."""
        return tokens * self.info.n_layers * self.info.sizes.cache * self.info.bytes_per_number

    def read(self, rows: int) -> int:
        """The logits of rows, and what a readout makes of them in float32."""
        return rows * self.info.vocab_size * (self.info.bytes_per_number + 3 * _FLOAT)

    def packed(self, tokens: int, prefix: int, rows: int) -> int:
        """A packed sequence of some tokens behind a prefix, of which some rows are read."""
        mask = tokens * (prefix + tokens) * (self.info.bytes_per_number + 1)
        return self.running(tokens) + self.cached(tokens + prefix) + self.read(rows) + mask

    def batch(self, rows: int, width: int, *, read: int, decodes: bool) -> int:
        """A padded batch, of which `read` positions a row are read.

        Where decoding goes on from it, keys and values are kept, and copied as rows leave.
        """
        tokens = rows * width
        return self.running(tokens) + self.read(rows * read) + 2 * decodes * self.cached(tokens)

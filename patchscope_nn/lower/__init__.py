"""A step of a plan as plain values: ints, strings, lists and tensors, which is all that may enter a context.

A body travels to machines that do not have this package, so it never sees a `Cell`, a `Plan` or a tokenizer.
"""

from patchscope_nn.lower.asked import eos_ids, stop_ids
from patchscope_nn.lower.reading import gathered, reading
from patchscope_nn.lower.step import unpack

__all__ = ["eos_ids", "gathered", "reading", "stop_ids", "unpack"]

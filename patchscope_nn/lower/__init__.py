"""A step of a plan -> a `StepProgram` of plain values, the only thing that may enter an nnsight context.

A body travels to machines that do not have this package, so it never sees a `Cell`, a `Plan` or a tokenizer.

    step.py      a whole step
    rows.py      prompts as rows of padded batches
    segments.py  target prompts as segments of one sequence
    made.py      the states that are written: read, given, or made of others
    asked.py     what a readout needs
    reading.py   steps that only read, or do nothing
"""

from patchscope_nn.lower.asked import eos_ids, stop_ids
from patchscope_nn.lower.reading import gathered, nothing, reading
from patchscope_nn.lower.step import lower

__all__ = ["eos_ids", "gathered", "lower", "nothing", "reading", "stop_ids"]

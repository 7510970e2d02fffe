"""Lowers a step of a plan to a `StepProgram`: plain values, which are all that may enter an nnsight context.

The code inside the context may run on machines that do not have this package, so it never sees a `Cell`, a
`Plan` or a tokenizer.

    step.py      a whole step
    rows.py      prompts as rows of padded batches
    segments.py  target prompts as segments of one sequence
    states.py    where the states of a step are in its table
    readout.py   the program of a readout
    reading.py   steps that only read, or do nothing
"""

from patchscope_nn.lower.reading import gathered, nothing, reading
from patchscope_nn.lower.readout import eos_ids, stop_ids
from patchscope_nn.lower.step import lower

__all__ = ["eos_ids", "gathered", "lower", "nothing", "reading", "stop_ids"]

"""The builtin kinds of readout, each in one file. Code outside this package never tests which kind it has.

    next_token.py   the distribution of the next token
    generate.py     the generated text
    choices.py      the probabilities of given continuations
    hidden.py       the written state

`spec.Readout` is the contract; docs/extending/readout.md shows how to add a kind.
"""

from patchscope_nn.readouts.choices import Choices
from patchscope_nn.readouts.generate import Generate
from patchscope_nn.readouts.hidden import Hidden
from patchscope_nn.readouts.next_token import NextToken
from patchscope_nn.spec import register_readout

# Messages list the kinds in this order.
for _kind in (NextToken, Generate, Choices, Hidden):
    register_readout(_kind)

__all__ = ["Choices", "Generate", "Hidden", "NextToken"]

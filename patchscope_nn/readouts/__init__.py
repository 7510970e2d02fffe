"""The kinds of readout that ship: each is one file, and nothing outside this room asks which one it is.

    next_token.py   the distribution of the next token
    generate.py     the text the model goes on with
    choices.py      how likely given continuations are
    hidden.py       the state that was written

`spec.Readout` is the contract; docs/extending/readout.md shows how a kind is added.
"""

from patchscope_nn.readouts.choices import Choices
from patchscope_nn.readouts.generate import Generate
from patchscope_nn.readouts.hidden import Hidden
from patchscope_nn.readouts.next_token import NextToken
from patchscope_nn.spec import register_readout

# In the order in which messages list them.
for _kind in (NextToken, Generate, Choices, Hidden):
    register_readout(_kind)

__all__ = ["Choices", "Generate", "Hidden", "NextToken"]

"""patchscope_nn: ask a language model, in its own words, what one of its hidden states means.

A Patchscope (Ghandeharioun et al. 2024, arXiv 2401.06102) takes the hidden state at a position and layer of
a source prompt, maps it, writes it into a target prompt, and reads what the model then says.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that `import
patchscope_nn` costs nothing.
"""

from lazy_loader import attach_stub

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

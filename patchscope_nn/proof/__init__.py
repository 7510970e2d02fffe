"""Proof at load: compares the compiler with plain hooks on a model, and switches off what differs.

There is no list of supported architectures. `load` loads a model, and when its structure is new, `prove`
compares the compiler with plain PyTorch hooks on this model. Optimisations that change a number are switched
off for it, by name. A model on which even the plain path is wrong is refused. The verdict is stored in the
user's cache.
"""

from patchscope_nn.proof.loading import load, proven, proven_on
from patchscope_nn.proof.prove import prove

__all__ = ["load", "prove", "proven", "proven_on"]

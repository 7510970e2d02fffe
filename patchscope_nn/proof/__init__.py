"""Proof at load: what the compiler makes of a Patchscope equals the model under plain hooks, or is not used.

No list of architectures is trusted. `load` loads a model, and the first time its structure is met `prove`
compares the compiler with plain PyTorch hooks on that very model. Optimisations that change a number are
switched off for it, by name. A model that even the plain path gets wrong is refused. The verdict is kept in
the user's cache.
"""

from patchscope_nn.proof.loading import load, proven, proven_on
from patchscope_nn.proof.prove import prove
from patchscope_nn.proof.store import structure_key

__all__ = ["load", "prove", "proven", "proven_on", "structure_key"]

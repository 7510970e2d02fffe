"""Where a step runs: here, through the rehearsal of a server, on NDIF, or its two models in two places.

places.py     the places, and Places: where M and M* run
steps.py      a plan's steps, one after the other
crossing.py   what travels between two places
ndif/         jobs on an NDIF server
"""

from patchscope_nn.backends.places import (
    Backend,
    Bridged,
    Local,
    Ndif,
    Places,
    Rehearsal,
)
from patchscope_nn.backends.steps import (
    Listener,
    PassTooLargeError,
    is_out_of_memory,
    results_of,
    run_steps,
)

__all__ = [
    "Backend",
    "Bridged",
    "Listener",
    "Local",
    "Ndif",
    "PassTooLargeError",
    "Places",
    "Rehearsal",
    "is_out_of_memory",
    "results_of",
    "run_steps",
]

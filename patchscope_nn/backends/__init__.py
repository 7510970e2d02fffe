"""Backends decide where a step runs: in this process, in a rehearsal, on a server, or in two places.

places.py     the backends, and `Places`: where M and M* run
steps.py      runs a plan's steps one after the other
crossing.py   divides a step whose models run in two places
jobs/         jobs on servers: their scheduler, log and size
ndif/         the client of NDIF
served/       a vLLM engine behind `patchscope serve`: server and client
"""

from patchscope_nn.backends.places import (
    Backend,
    Bridged,
    Local,
    Ndif,
    Places,
    Rehearsal,
    Served,
    Server,
)
from patchscope_nn.backends.steps import (
    Listener,
    PassResult,
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
    "PassResult",
    "PassTooLargeError",
    "Places",
    "Rehearsal",
    "Served",
    "Server",
    "is_out_of_memory",
    "results_of",
    "run_steps",
]

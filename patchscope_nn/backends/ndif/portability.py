"""Checks, before anything is sent, that a mapping or the body of a readout can run on a server.

A server has torch, nnsight and transformers. A module of the user's is there only if it is sent along.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from patchscope_nn.errors import MappingError

#: The packages that every server has; everything else has to be sent.
_ON_SERVERS = frozenset({"torch", "numpy", "nnsight", "cloudpickle", "transformers", "patchscope_nn"})


def check_travels(call: Callable[..., Any] | Mapping[Any, Any] | None, *, what: str = "mapping") -> None:
    """Refuse a function that could not run on a server. Tensors always can.

    Raises:
        MappingError: It needs a module that is not sent with it, or it holds a model.
    """
    if call is None or isinstance(call, Mapping):
        return
    import nnsight
    from nnsight.intervention.envoy import Envoy
    from nnsight.intervention.serialization import CustomCloudPickler

    nnsight.register("patchscope_nn")
    _register_local(call)

    class Visitor(CustomCloudPickler):
        """Visits every object that would be sent."""

        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Envoy):
                raise MappingError(
                    f"the {what} holds a model of its own, and a request names one: on a server it would run "
                    "on the target's weights.",
                    hint=f"Give the {what} tensors, not a model.",
                )
            needed = obj if isinstance(obj, ModuleType) else None
            if isinstance(obj, FunctionType | type):
                needed = sys.modules.get(obj.__module__ or "")
            if needed is not None and not _travels(needed.__name__):
                root = needed.__name__.split(".")[0]
                raise MappingError(
                    f"the {what} needs the module {root!r}, which a server need not have.",
                    hint=f"Let it travel with the request: import nnsight; nnsight.register({root!r})",
                )
            return super().persistent_id(obj)

    Visitor(io.BytesIO(), protocol=4).dump(call)


def _travels(module: str) -> bool:
    from cloudpickle.cloudpickle import list_registry_pickle_by_value

    parts = module.split(".")
    registered = list_registry_pickle_by_value()
    outer = {".".join(parts[: end + 1]) for end in range(len(parts))}
    known = parts[0] in _ON_SERVERS | {"__main__"} or parts[0] in sys.stdlib_module_names
    return known or bool(outer & registered)


def _register_local(call: Any) -> None:
    """Send a module of the user's along, unless it belongs to an installed package."""
    import nnsight

    named = call if isinstance(call, FunctionType) else type(call)
    module = sys.modules.get(named.__module__)
    file = getattr(module, "__file__", None)
    if module is not None and file and "site-packages" not in file and not _travels(module.__name__):
        nnsight.register(module.__name__.split(".")[0])

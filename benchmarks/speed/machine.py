"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("patchscope-nn", "nnsight", "transformers", "torch")
#: What is the same for all that was measured on one machine.
MACHINE = ("cpu", "cores", "threads", "memory", "system", "python", *_PACKAGES)


def describe(*, threads: int, command: str) -> dict[str, Any]:
    """The machine, the versions, the date and the command."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory": _field("/proc/meminfo", "MemTotal") or "unknown",
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _field(file: str, name: str) -> str:
    """A field of one of Linux's files; empty where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")

"""The time, as manifests, job logs and provenance hold it."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """The time in UTC, in ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

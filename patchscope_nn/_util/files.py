"""Writing files that are always complete for readers, even if a process is killed while it writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a draft beside `file`, which replaces it if the block ends without an error.

    A reader sees the old file or the complete new one. After an error the draft is removed.

    Args:
        file: The file. Its folder must exist.

    Yields:
        The path of the draft, which only this thread uses.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text as UTF-8; a reader sees the old file or the complete new one."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8")


def append_lines(file: Path, lines: bytes) -> None:
    """Append complete lines, and return once they are on the disk."""
    with file.open("ab") as stream:
        stream.write(lines)
        stream.flush()
        os.fsync(stream.fileno())


def whole_lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, except a half-written last line; nothing if the file does not exist."""
    if not file.exists():
        return
    with file.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield line


def cut_half_line(file: Path) -> None:
    """Remove a half-written last line of a killed process; call it only in the process that writes next."""
    whole = sum(map(len, whole_lines(file)))
    if file.exists() and file.stat().st_size > whole:
        os.truncate(file, whole)

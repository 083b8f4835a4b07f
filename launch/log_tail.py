"""The part of a log that says what went wrong."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 64 * 1024
_MAX_TRACEBACK_LINES = 200
_RANK_PREFIX = re.compile(r"^\[?(?:rank|default)\s?\d+\]?:\s?")
_TRACEBACK = "Traceback (most recent call last):"
# "ValueError: ...", "tinker_hpc.errors.WeightsError: ..."; not torch's own summary of another process's failure.
_ERROR_LINE = re.compile(r"^(?!.*ChildFailedError)[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*")


def read_tail(path: Path) -> str:
    """The last 64 KiB of a log as text; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def last_traceback(text: str) -> str | None:
    """The last Python traceback in a log, to the end of the log; None if there is none (pure)."""
    start = text.rfind(_TRACEBACK)
    if start < 0:
        return None
    # A chained exception ("During handling of the above ...") is one story: begin at its first part.
    while (before := text.rfind(_TRACEBACK, 0, start)) >= 0 and _is_chained(text[before:start]):
        start = before
    return "\n".join(text[start:].rstrip().splitlines()[:_MAX_TRACEBACK_LINES])


def _is_chained(between: str) -> bool:
    return "During handling of the above exception" in between or "direct cause of the following" in between


def error_line(text: str) -> str | None:
    """The line that names the error, e.g. "ValueError: no such file"; None if no line looks like one (pure)."""
    for line in reversed(text.splitlines()):
        bare = _RANK_PREFIX.sub("", line.strip())
        if _ERROR_LINE.match(bare):
            return bare
    return None


def last_lines(text: str, count: int = 15) -> str:
    """The last lines that are not empty (pure)."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])

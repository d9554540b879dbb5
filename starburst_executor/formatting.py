"""Durations, moments, amounts of money and text of others, as people read them."""

from __future__ import annotations

import re
from datetime import UTC, datetime

__all__ = ["UNPRINTABLE", "dollars", "duration", "one_line", "printable", "utc"]

_COLOURS = re.compile(r"\x1b\[[0-9;:]*m")

# What controls a terminal, or the direction of the text that follows; and what cannot be encoded.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_EARLIEST, _LATEST = -1e10, 1e11  # about the years 1653 and 5138


def one_line(text: str) -> str:
    """The text with line breaks as spaces, and "?" for what could control a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def printable(text: str) -> str:
    r"""Text of any length and from anybody, harmless on a terminal.

    Lines and tabs stay, colours are left out, and any other control character is written out, as in
    `\x1b]0;title\x07`.
    """
    text = _COLOURS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def utc(seconds: float) -> datetime:
    """A moment by the clock of a store or a worker, which may show anything."""
    return datetime.fromtimestamp(min(max(seconds, _EARLIEST), _LATEST), UTC)


def duration(seconds: float) -> str:
    """Seconds for people: `0.03 ms`, `12.4 s`, `3:05`, `2:03:05`, `4 d 02:03:05`."""
    if seconds < 59.95:
        return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def dollars(amount: float) -> str:
    """Dollars for people: `$12.40`, `$0.031`, `$0.00012`, `$0`."""
    if amount >= 0.995:
        return f"${amount:,.2f}"
    if amount >= 0.1:
        return f"${amount:.2f}"
    if amount >= 0.0001:
        return f"${amount:.2g}"
    return f"${amount:.8f}".rstrip("0").rstrip(".")

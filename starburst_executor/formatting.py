"""Durations and amounts of money, as people read them."""

from __future__ import annotations

__all__ = ["dollars", "duration"]


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

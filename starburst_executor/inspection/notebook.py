"""Sessions, status and outcomes as HTML, and a live display, in notebooks.

Styles are inline and colours half transparent: notebooks have light and dark themes of their own,
and apply the style sheets of an output to the whole page. Text from users and tasks is escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

from starburst_executor.errors import StarburstError
from starburst_executor.tables import counted, percent

if TYPE_CHECKING:
    from starburst_executor.client.outcomes import TaskOutcome
    from starburst_executor.costs.bill import CostSummary
    from starburst_executor.executor import StarburstExecutor
    from starburst_executor.inspection.status import SessionStatus, SessionSummary
    from starburst_executor.inspection.terminal import Progress
from starburst_executor.formatting import duration

__all__ = [
    "NotebookDisplay",
    "executor_html",
    "open_notebook_display",
    "outcome_html",
    "sessions_html",
    "status_html",
]


_LONGEST_VALUE = 500  # characters of a value's repr

# Readable on white and on black.
_COLOURS = {
    "completed": "#3b8ee0",
    "failed": "#e0524b",
    "running": "#2aa876",
    "claimed": "#7f93a8",
    "cancelled": "#b08fd8",
    "pending": "rgba(128,136,148,.35)",
}

_CELL = (
    "text-align:left;padding:2px 12px 2px 0;"
    "border-bottom:1px solid rgba(128,128,128,.25);vertical-align:top"
)

_SOFT = "opacity:.7"

# Notebooks take text between two dollar signs for a formula unless told otherwise.
_PLAIN = 'class="mathjax_ignore tex2jax_ignore"'


def status_html(status: SessionStatus) -> str:
    """A bar of tasks by state, and the counts below it."""
    html = _status(status, f"{status.workers} of {counted(status.workers_wanted, 'worker')}")
    if status.stuck is not None:
        html += f'<div style="color:{_COLOURS["failed"]}">{escape(str(status.stuck))}</div>'
    return html if status.cost is None else f"{html}{_cost(status.cost)}"


def _cost(cost: CostSummary) -> str:
    lines = "; ".join(f"{label.lower()}: {text}" for label, text in cost.lines())
    colour = f"color:{_COLOURS['failed']}" if cost.alert else _SOFT
    return f'<div {_PLAIN} style="{colour}">{escape(lines)}</div>'


def _status(status: SessionStatus, rest: str) -> str:
    name = f"{escape(status.name)} &middot; " if status.name else ""
    head = (
        f"<b>{name}<code>{escape(status.session_id)}</code></b> "
        f'<span style="{_SOFT}">{escape(status.state)}, {percent(status.progress)} '
        f"of {status.total:,}</span>"
    )
    return (
        f'<div {_PLAIN} style="max-width:52em;line-height:1.6">'
        f"{head}{_bar(status)}{_legend(status, rest)}</div>"
    )


def _bar(status: SessionStatus) -> str:
    parts = "".join(
        f'<span style="width:{100 * count / status.total:.3f}%;'
        f'background:{_COLOURS[state]}"></span>'
        for state in _COLOURS
        if (count := getattr(status, state))
    )
    return (
        '<div style="display:flex;height:10px;margin:5px 0;border-radius:5px;overflow:hidden;'
        f'background:{_COLOURS["pending"]}">{parts}</div>'
    )


def _legend(status: SessionStatus, rest: str) -> str:
    parts = [
        '<span style="display:inline-block;width:.75em;height:.75em;border-radius:2px;'
        f'background:{colour};margin-right:.35em"></span>{getattr(status, state):,} {state}'
        for state, colour in _COLOURS.items()
        if getattr(status, state) or state in ("completed", "failed", "pending")
    ]
    spaced = "".join(f'<span style="margin-right:1.1em">{part}</span>' for part in parts)
    return f'<div>{spaced}<span style="{_SOFT}">{escape(rest)}</span></div>'


def executor_html(executor: StarburstExecutor) -> str:
    """The status of its session, and the call that attaches to it; never raises."""
    attach = f"StarburstExecutor.attach({executor.session_id!r}, store={executor.store!r})"
    try:
        shown = status_html(executor.status())
    except (StarburstError, RuntimeError, OSError) as error:
        name = f"<b>StarburstExecutor <code>{escape(executor.session_id)}</code></b>"
        return f'<div {_PLAIN}>{name}<br><span style="{_SOFT}">{escape(str(error))}</span></div>'
    return f'<div {_PLAIN}>{shown}<code style="{_SOFT}">{escape(attach)}</code></div>'


def sessions_html(sessions: Iterable[SessionSummary]) -> str:
    """A table of sessions."""
    headings = (
        "session_id", "name", "created_at", "last_activity", "progress", "total", "pending",
        "claimed", "running", "completed", "failed", "cancelled", "workers", "state",
    )  # fmt: skip
    rows = [
        (
            f"<code>{escape(one.session_id)}</code>",
            escape(one.name or ""),
            f"{one.created_at:%Y-%m-%d %H:%M:%S}",
            f"{one.last_activity:%Y-%m-%d %H:%M:%S}",
            percent(one.progress),
            *(
                f"{n:,}"
                for n in (
                    one.total,
                    one.pending,
                    one.claimed,
                    one.running,
                    one.completed,
                )
            ),
            _red(one.failed),
            *(f"{n:,}" for n in (one.cancelled, one.workers)),
            _state(one),
        )
        for one in sessions
    ]
    if not rows:
        return "<i>no sessions</i>"
    return _table([headings, *rows])


def _state(one: SessionSummary) -> str:
    if one.alert is None:
        return escape(one.state)
    colour = _COLOURS["failed"]
    alert = f'<span style="color:{colour}" title="{escape(one.alert)}">over its cost_alert</span>'
    return f"{escape(one.state)}, {alert}"


def _red(count: int) -> str:
    return f'<b style="color:{_COLOURS["failed"]}">{count:,}</b>' if count else "0"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its heading; cells are HTML already."""
    lines = [
        "".join(f'<{tag} style="{_CELL}">{cell}</{tag}>' for cell in row)
        for row, tag in zip(rows, ["th", *["td"] * len(rows)], strict=False)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table {_PLAIN} style="border-collapse:collapse">{body}</table>'


def outcome_html(outcome: TaskOutcome) -> str:
    """How a task ended: its value, or its error with the remote traceback collapsed."""
    colour = _COLOURS.get(outcome.state, _COLOURS["pending"])
    tried = f"attempt {outcome.attempt}, " if outcome.attempt > 1 else ""
    where = f"{tried}{duration(outcome.seconds)} on {outcome.worker}" if outcome.worker else ""
    head = (
        f'<span style="color:{colour}">&#9679;</span> '
        f"<b>task <code>{escape(outcome.task_id)}</code></b> "
        f'{escape(outcome.state)} <span style="{_SOFT}">{escape(where)}</span>'
    )
    return f"<div {_PLAIN}>{head}{_result(outcome)}</div>"


def _result(outcome: TaskOutcome) -> str:
    if outcome.ok:
        return _pre(_short_repr(outcome.value))
    if outcome.error is None:
        return ""
    text = f"{outcome.type}: {outcome.message}" if outcome.message else outcome.type
    if not outcome.traceback:
        return _pre(text)
    return f"<details><summary>{escape(text)}</summary>{_pre(outcome.traceback)}</details>"


def _pre(text: str) -> str:
    return f'<pre style="margin:4px 0;overflow-x:auto">{escape(text)}</pre>'


def _short_repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # the user's own code
        return f"<{type(value).__qualname__} whose repr failed: {error!r}>"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def open_notebook_display(stream: TextIO) -> NotebookDisplay | None:
    """A display in the running cell's output; None outside a notebook, or for another stream."""
    if stream not in (sys.stdout, sys.stderr) or "IPython" not in sys.modules:
        return None
    shell = import_module("IPython").get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    drawing = import_module("IPython.display")
    handle = drawing.display(drawing.HTML(_START), display_id=True)
    return NotebookDisplay(handle, drawing.HTML)


_START = f'<span style="{_SOFT}">nothing submitted yet</span>'


class NotebookDisplay:
    """Progress in the output of a cell, redrawn in place; needs no widgets.

    Args:
        handle: IPython's handle of the output.
        wrap: Turns HTML into something displayable.
    """

    def __init__(self, handle: Any, wrap: Any) -> None:
        self._handle = handle
        self._wrap = wrap
        self._shown = ""

    def show(self, progress: Progress) -> None:
        """Draw it, unless it looks the same."""
        words = [
            text
            for name, text in progress.counts()
            if name in ("rate", "left", "workers", "cost", "alert")
        ]
        html = _status(progress.status, ", ".join(words))
        if html != self._shown:
            self._shown = html
            self._handle.update(self._wrap(html))

    def close(self) -> None:
        """Leave the last drawing in place."""

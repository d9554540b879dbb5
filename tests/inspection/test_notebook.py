"""What people see in a notebook: one is run for real, and its outputs are read."""

from __future__ import annotations

import asyncio
import re
import sys
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from starburst_executor import (
    SessionStatus,
    SessionSummary,
    StarburstExecutor,
    TaskOutcome,
)
from starburst_executor.inspection.notebook import open_notebook_display
from starburst_executor.inspection.status import SessionList

MOMENT = datetime(2026, 1, 31, 12, tzinfo=UTC)

# --- what each thing looks like ----------------------------------------------------


def status(**changes: Any) -> SessionStatus:
    given: dict[str, Any] = {
        "session_id": "20260131-120000-abcdef", "name": None, "state": "open",
        "total": 10, "pending": 4, "claimed": 0, "running": 1,
        "completed": 3, "failed": 2, "cancelled": 0, "workers": 1,
        "workers_wanted": 2, "created_at": MOMENT, "last_activity": MOMENT, "deadline": MOMENT,
    }  # fmt: skip
    return SessionStatus(**{**given, **changes})


def html(thing: Any) -> str:
    return str(thing._repr_html_())


def test_a_status_is_a_bar_with_counts() -> None:
    shown = html(status())
    assert "50% of 10" in shown
    assert "width:30.000%" in shown
    assert "3 completed" in shown
    assert "1 of 2 workers" in shown
    assert "cancelled" not in shown


def test_a_session_without_tasks_has_an_empty_bar() -> None:
    assert "0 completed" in html(status(total=0, pending=0, running=0, completed=0, failed=0))


def test_an_outcome_shows_its_value_or_its_error() -> None:
    good = TaskOutcome(
        index=0, task_id="0-0", state="completed", value=[1, 2], worker="w", attempt=1, seconds=0.5
    )
    bad = TaskOutcome(
        index=1, task_id="0-1", state="failed",
        error=ValueError("<b>"), type="ValueError", message="<b>",
        traceback="Traceback ...\nValueError: <b>", worker="w", attempt=2,
    )  # fmt: skip
    assert "[1, 2]" in html(good)
    assert "500 ms on w" in html(good)
    assert "ValueError: &lt;b&gt;" in html(bad)
    assert "<b>:" not in html(bad)
    assert "attempt 2" in html(bad)


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("<script>", "&#x27;&lt;script&gt;&#x27;"),
        ("x" * 10_000, "..."),
        (Unshowable(), "&lt;Unshowable whose repr failed: RuntimeError(&#x27;no&#x27;)&gt;"),
    ],
)  # fmt: skip
def test_a_value_is_shown_escaped_short_and_whatever_its_repr_does(
    value: object, shown: str
) -> None:
    outcome = TaskOutcome(index=0, task_id="0-0", state="completed", value=value)
    assert shown in html(outcome)
    assert len(html(outcome)) < 1500


def summary(**changes: Any) -> SessionSummary:
    given: dict[str, Any] = {
        "session_id": "s", "name": None, "state": "open",
        "created_at": MOMENT, "last_activity": MOMENT,
        "total": 9, "pending": 0, "claimed": 0, "running": 0,
        "completed": 8, "failed": 1, "cancelled": 0, "workers": 2, "idle": 3.2,
    }  # fmt: skip
    return SessionSummary(**{**given, **changes})


def test_a_list_of_sessions_prints_as_a_table_of_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = summary(
        session_id="20260131-120000-abcdef", name="a name\nof great length" * 5,
        state="terminated", total=1_000_000, completed=999_998, running=120,
        failed=1, cancelled=1, workers=120, idle=1e6,
    )  # fmt: skip
    lines = str(SessionList([long])).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split()[:4] == ["session_id", "name", "state", "done"]
    assert "20260131-120000-abcdef" in lines[1]
    assert str(SessionList()) == "no sessions"


def test_a_list_says_what_is_done_only_when_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    almost = summary(total=1000, completed=999, failed=0, name="run 7")
    line = str(SessionList([almost])).splitlines()[1]
    assert line.split() == ["s", "run", "7", "open", "99%", "1000", "0", "0", "0", "2", "3s"]


def test_a_list_of_sessions_is_a_table_and_still_a_list() -> None:
    one = summary(session_id="20260131-120000-abcdef", name="a<b", cancelled=3)
    shown = SessionList([one])
    assert shown == [one]
    assert html(shown).count("<tr>") == 2
    assert "2026-01-31 12:00:00" in html(shown)
    assert "a&lt;b" in html(shown)
    for heading in ("name", "progress", "cancelled", "workers"):
        assert f">{heading}</th>" in html(shown)
    assert html(SessionList()) == "<i>no sessions</i>"


def test_a_session_that_has_cost_too_much_says_so_in_the_list() -> None:
    one = summary(alert="has cost $2, more than $1")
    shown = html(SessionList([one]))
    assert "over its cost_alert" in shown
    assert 'title="has cost $2, more than $1"' in shown


def test_dollar_signs_are_not_taken_for_formulas(directory_url: str) -> None:
    """JupyterLab draws what stands between two of them as one, unless this class forbids it."""
    outcome = TaskOutcome(
        index=1, task_id="0-1", state="failed", error=ValueError("$1, $2"), type="ValueError",
        message="$1, $2", traceback="Traceback",
    )  # fmt: skip
    one = summary()
    with StarburstExecutor(1, store=directory_url) as executor:
        shown = [html(executor), html(executor.status())]
    shown += [html(executor), html(outcome), html(SessionList([one]))]
    for text in shown:
        assert re.match(r'<\w+ class="mathjax_ignore tex2jax_ignore"', text), text


def test_an_executor_whose_session_is_gone_says_so_instead_of_failing(
    directory_url: str,
) -> None:
    with StarburstExecutor(1, store=directory_url) as executor:
        assert "0 completed" in html(executor)
        store = escape(repr(executor.store))
        assert f", store={store})" in html(executor)
    assert f"there is no session &#x27;{executor.session_id}&#x27;" in html(executor)


def test_outside_a_notebook_there_is_no_notebook_display(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert open_notebook_display(sys.stderr) is None


# --- a notebook, run ---------------------------------------------------------------

CELLS = """
from starburst_executor import Intervals, StarburstExecutor, list_sessions
quick = Intervals(
    lease=2, heartbeat=0.25, poll_first=0.02, poll_last=0.2, look_first=0.01, look_last=0.1
)
ex = StarburstExecutor(2, store="STORE", name="notebook", keep=True, progress=True, intervals=quick)
---
import time

def square(x):
    time.sleep(0.1)
    return x * x

list(ex.map(square, range(30)))
---
import asyncio
asyncio.get_running_loop().is_running(), await asyncio.wrap_future(ex.submit(square, 7))
---
def fail(x):
    raise ValueError(f"{x} is <b>wrong</b>")

future = ex.submit(fail, 1)
outcomes = ex.collect(wait=True)
outcomes[-1]
---
outcomes[3]
---
ex
---
ex.status()
---
list_sessions("STORE")
---
ex.shutdown()
---
StarburstExecutor.attach(ex.session_id, store="STORE")
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Any:
    """A notebook after all its cells were run by a real kernel."""
    cells = CELLS.replace("STORE", str(tmp_path / "store")).split("---\n")
    made = nbformat.from_dict(  # type: ignore[no-untyped-call]
        {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {},
            "cells": [_cell(c) for c in cells],
        }
    )
    client = nbclient.NotebookClient(made, timeout=60, kernel_name="python3")
    asyncio.run(client.async_execute())
    nbformat.write(made, tmp_path / "shown.ipynb")  # type: ignore[no-untyped-call]
    return made


def _cell(source: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": f"c{abs(hash(source))}",
        "source": source.strip(),
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }


def outputs(cell: Any, kind: str) -> list[str]:
    return ["".join(out["data"][kind]) for out in cell.outputs if kind in out.get("data", {})]


def test_a_notebook_shows_everything_and_works_inside_its_event_loop(
    notebook: Any,
) -> None:
    made, mapped, awaited, failed, outcome, executor, now, sessions, _, attached = notebook.cells
    assert outputs(mapped, "text/plain")[0].endswith("841]")
    assert outputs(awaited, "text/plain") == ["(True, 49)"]
    assert "ValueError: 1 is &lt;b&gt;wrong&lt;/b&gt;" in outputs(failed, "text/html")[0]
    assert "<pre" in outputs(outcome, "text/html")[0]
    assert "32 completed" not in outputs(executor, "text/html")[0]
    assert "31 completed" in outputs(executor, "text/html")[0]
    assert "1 failed" in outputs(now, "text/html")[0]
    assert "<table" in outputs(sessions, "text/html")[0]
    assert "100% of 32" in outputs(attached, "text/html")[0]
    progress = outputs(made, "text/html")
    assert len(progress) == 1, "one display, drawn anew in place"
    assert "100% of 32" in progress[0]
    errors = [
        out
        for cell in notebook.cells
        for out in cell.outputs
        if out.output_type in ("error", "stream")
    ]
    assert not errors, errors

"""The charts of a report, as Vega-Lite specifications with their data.

However many tasks there are, a chart has at most a few thousand shapes: with more attempts, the
timeline shows instead what each worker did in each stretch of time.

Colours are CSS variables of the page, so they follow light and dark mode.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from starburst_executor.formatting import duration
from starburst_executor.inspection.report.review import Review, Run, Stay, Trace

__all__ = ["Chart", "charts", "chosen_tasks"]

Spec = dict[str, Any]

_MOST_SHAPES = 1500  # attempts drawn one by one; more are aggregated
_CELLS = 100  # stretches of time into which they are aggregated
_ROWS = 60  # most rows of workers, or of bands of workers
_TASKS = 40  # most rows of tasks
_LABELLED = 40  # rows with room for a label each
_BARS = 30  # of a histogram

_HOWS = {
    "waiting": "var(--waiting)",
    "claimed": "var(--claimed)",
    "completed": "var(--completed)",
    "failed": "var(--failed)",
    "lost": "var(--lost)",
    "handed back": "var(--back)",
    "cancelled": "var(--cancelled)",
    "running": "var(--running)",
}

_CONFIG: Spec = {
    "background": None,
    "font": "system-ui, 'Liberation Sans', sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--line)",
        "gridColor": "var(--line)",
        "tickColor": "var(--line)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "legend": {"labelFontSize": 12, "orient": "top", "title": None},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart.

    Attributes:
        name: Id of its element.
        title: Its heading.
        caption: What it shows.
        spec: The Vega-Lite specification.
        half: Whether half the page's width is enough.
    """

    name: str
    title: str
    caption: str
    spec: Spec
    half: bool = False


def charts(review: Review) -> list[Chart]:
    """The charts of a session that has tasks."""
    axis = _TimeAxis.of(review)
    return [
        _where_time_went(review),
        _workers(review, axis),
        _tasks(review, axis),
        _done(review, axis),
        _live(review, axis),
        _run_times(review),
        _wait_times(review),
    ]


# --- time --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TimeAxis:
    """UTC seconds as the horizontal axis shows them."""

    begin: float
    end: float
    unit: float
    unit_name: str

    @classmethod
    def of(cls, review: Review) -> _TimeAxis:
        for unit, name, least in (
            (86400, "days", 4),
            (3600, "hours", 2),
            (60, "minutes", 3),
        ):
            if review.seconds >= least * unit:
                return cls(review.begin, review.end, unit, name)
        return cls(review.begin, review.end, 1, "seconds")

    def at(self, moment: float) -> float:
        """The position of a moment on the axis."""
        inside = min(max(moment, self.begin), self.end)
        return round((inside - self.begin) / self.unit, 5)

    def encoding(self, field: str = "a") -> Spec:
        """The encoding of a field computed by `at`."""
        return {
            "field": field,
            "type": "quantitative",
            "title": f"{self.unit_name} since the session began",
            "scale": {"domain": [0, self.at(self.end)], "nice": False},
            "axis": {"grid": False, "tickCount": 8},
        }


def _chart(height: float | Spec, values: list[Spec], **parts: Any) -> Spec:
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": values},
        "config": _CONFIG,
        **parts,
    }


def _colours(hows: Iterable[str]) -> Spec:
    """A colour for each way an attempt can end, and a legend of those that occur."""
    present = set(hows)
    domain = [how for how in _HOWS if how in present]
    return {
        "field": "how",
        "type": "nominal",
        "scale": {"domain": domain, "range": [_HOWS[how] for how in domain]},
        "legend": {"columns": 5, "symbolType": "square"},
    }


def _hints(**titles: str) -> list[Spec]:
    """The tooltip: field -> title."""
    return [{"field": field, "title": title} for field, title in titles.items()]


# --- where the time went -----------------------------------------------------------

_PARTS = {
    "useful": ("running tasks", "var(--completed)"),
    "repeated": ("wasted attempts", "var(--lost)"),
    "starting": ("workers starting up", "var(--back)"),
    "handover": ("free while tasks waited", "var(--failed)"),
    "tail": ("free during the last tasks", "var(--claimed)"),
    "idle": ("nothing to do", "var(--idle)"),
}


def _where_time_went(review: Review) -> Chart:
    work = review.work
    values: list[Spec] = [
        {
            "part": label,
            "rank": rank,
            "share": getattr(work, name) / work.paid if work.paid else 0,
            "time": duration(getattr(work, name)),
        }
        for rank, (name, (label, _)) in enumerate(_PARTS.items())
    ]
    colour = {
        "field": "part",
        "type": "nominal",
        "scale": {
            "domain": [p[0] for p in _PARTS.values()],
            "range": [p[1] for p in _PARTS.values()],
        },
        "legend": None,
    }
    widest = max(value["share"] for value in values)
    room = 1.3 * widest or 1  # the numbers come after the bars
    base = {
        "y": {"field": "part", "type": "nominal", "sort": None, "title": None,
              "axis": {"labelLimit": 190, "labelPadding": 8, "ticks": False, "domain": False}},
        "x": {"field": "share", "type": "quantitative", "title": None,
              "scale": {"domain": [0, room]}, "axis": None},
    }  # fmt: skip
    spec = _chart(
        {"step": 26},
        values,
        encoding=base,
        layer=[
            {"mark": {"type": "bar", "height": 16, "cornerRadiusEnd": 3},
             "encoding": {"color": colour, "tooltip": _hints(part="", time="")}},
            {"mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 12},
             "encoding": {"text": {"field": "share", "format": ".1%"}}},
        ],
    )  # fmt: skip
    caption = (
        f"Between the first task and the last, workers provided {duration(work.paid)} of slot time."
    )
    return Chart(name="time", title="Where the time of workers went", caption=caption, spec=spec)


# --- workers -----------------------------------------------------------------------


def _workers(review: Review, axis: _TimeAxis) -> Chart:
    count = sum(len(trace.runs) for trace in review.observed.traces)
    if count <= _MOST_SHAPES and len(review.observed.stays) <= _ROWS:
        return _each_attempt(review, axis)
    return _cells(review, axis)


def _label(rank: int, stay: Stay) -> str:
    return f"{rank + 1} {stay.worker}"


def _rows(names: list[str], title: str) -> Spec:
    return {
        "field": "row",
        "type": "nominal",
        "sort": names,
        "scale": {"domain": names},
        "title": title,
        "axis": {
            "labels": len(names) <= _LABELLED,
            "labelFontSize": 12 if len(names) <= 20 else 10,
            "labelLimit": 110,
            "ticks": False,
            "domain": False,
        },
    }


def _step(rows: int) -> float:
    return min(24.0, max(8.0, 520 / max(1, rows)))


def _each_attempt(review: Review, axis: _TimeAxis) -> Chart:
    """A bar for each attempt, in the row of its worker."""
    stays = review.observed.stays
    names = {stay.worker: _label(rank, stay) for rank, stay in enumerate(stays)}
    lanes = _lanes(review.observed.traces)
    values = [
        {
            "row": names[run.worker],
            "lane": lanes[trace.place, run.number],
            **_attempt(trace, run, axis),
        }
        for trace in review.observed.traces
        for run in trace.runs
        if run.started
    ]
    lives = [
        {"row": names[s.worker], "a": axis.at(s.started), "b": axis.at(s.ended), "life": _life(s)}
        for s in stays
    ]  # fmt: skip
    slots = max((stay.slots for stay in stays), default=1)
    colours = _colours(value["how"] for value in values)
    lane = {"yOffset": {"field": "lane", "type": "nominal"}} if slots > 1 else {}
    spec = _chart(
        {"step": _step(len(names)) * max(1.0, slots / 2), "for": "position"},
        values,
        encoding={"y": _rows(list(names.values()), "worker"), "x": axis.encoding(),
                  "x2": {"field": "b"}},
        layer=[
            {"data": {"values": lives},
             "mark": {"type": "bar", "color": "var(--idle)", "height": {"band": 1}},
             "encoding": {"tooltip": _hints(row="worker", life="")}},
            {"mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 0.5,
                      "height": {"band": 0.9}},
             "encoding": {"color": colours, "tooltip": _ATTEMPT_HINTS, **lane}},
            # An attempt may be too short to be visible; a failure must be visible.
            {"transform": [{"filter": {"field": "how", "oneOf": ["failed", "lost"]}}],
             "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 70,
                      "opacity": 1, "stroke": "var(--paper)", "strokeWidth": 1},
             "encoding": {"x": {"field": "b", "type": "quantitative"}, "x2": None,
                          "color": colours, "tooltip": _ATTEMPT_HINTS, **lane}},
        ],
    )  # fmt: skip
    caption = (
        "Each bar is an attempt at a task, in the row of its worker, whose lifetime is grey; "
        "diamonds mark failed and lost attempts. Hover for details."
    )
    return Chart(name="workers", title="What workers did", caption=caption, spec=spec)


_ATTEMPT_HINTS = _hints(
    task="task", attempt="attempt", how="ended", waited="waited", ran="ran", worker="on"
)  # fmt: skip


def _attempt(trace: Trace, run: Run, axis: _TimeAxis) -> Spec:
    return {
        "a": axis.at(run.started),
        "b": axis.at(run.ended),
        "task": trace.called,
        "attempt": f"{run.number} of {trace.runs[-1].number}",
        "how": run.how,
        "waited": duration(max(0.0, run.started - run.since)),
        "ran": duration(run.seconds),
        "worker": run.worker,
    }


def _life(stay: Stay) -> str:
    return f"{stay.host or 'host unknown'}, {duration(stay.seconds)}, {stay.why or 'live'}"


def _lanes(traces: list[Trace]) -> dict[tuple[int, int], int]:
    """Which of its worker's slots each attempt had, judging by their times."""
    runs = [
        (run.started, trace.place, run) for trace in traces for run in trace.runs if run.started
    ]
    ends: dict[str, list[float]] = defaultdict(list)
    lanes: dict[tuple[int, int], int] = {}
    for started, place, run in sorted(runs, key=lambda one: one[:2]):
        free = ends[run.worker]
        lane = next((i for i, end in enumerate(free) if end <= started + 1e-3), len(free))
        free[lane : lane + 1] = [run.ended]
        lanes[place, run.number] = lane
    return lanes


@dataclass(slots=True)
class _Cell:
    """What a worker, or a band of them, did in a stretch of time."""

    busy: float = 0
    begun: int = 0
    failed: int = 0
    lost: int = 0
    longest: float = 0
    task: str = ""


def _cells(review: Review, axis: _TimeAxis) -> Chart:
    """How busy each worker, or band of workers, was in each stretch of time."""
    stays = review.observed.stays
    size = -(-len(stays) // _ROWS)
    bands = [stays[i : i + size] for i in range(0, len(stays), size)]
    row_of = {stay.worker: row for row, band in enumerate(bands) for stay in band}
    names = [_band_name(band, row * size) for row, band in enumerate(bands)]
    slots = [sum(stay.slots for stay in band) for band in bands]
    step = (axis.end - axis.begin) / _CELLS
    values = [
        _cell_value(cell, names[row], column, step, slots[row], axis)
        for (row, column), cell in sorted(_fill(review, row_of, step).items())
    ]
    y = _rows(names, "worker" if size == 1 else f"workers, {size} to a row")
    marks = {"data": {"values": [v for v in values if v["failed"] or v["lost"]]}}
    spec = _chart(
        {"step": _step(len(names))},
        values,
        encoding={"y": y, "x": axis.encoding(), "x2": {"field": "b"}, "tooltip": _CELL_HINTS},
        layer=[
            {"mark": {"type": "rect", "color": "var(--completed)"},
             "encoding": {"fillOpacity": {
                 "field": "busy", "type": "quantitative", "legend": None,
                 "scale": {"domain": [0, 1], "range": [0.06, 1]}}}},
            {**marks, "mark": {"type": "rect", "height": {"band": 0.45}},
             "encoding": {"color": _colours(["failed", "lost"])}},
        ],
    )  # fmt: skip
    caption = (
        f"The stronger the colour, the busier, in stretches of {duration(step)}; marks show where "
        "tasks failed or were lost with their worker. Hover for details."
    )
    return Chart(name="workers", title="What workers did", caption=caption, spec=spec)


_CELL_HINTS = _hints(
    row="worker", share="busy", begun="tasks begun", task="longest", longest="ran",
    failed="failed", lost="lost",
)  # fmt: skip


def _band_name(band: list[Stay], first: int) -> str:
    if len(band) == 1:
        return _label(first, band[0])
    return f"{first + 1} to {first + len(band)}"


def _fill(review: Review, row_of: dict[str, int], step: float) -> dict[tuple[int, int], _Cell]:
    cells: dict[tuple[int, int], _Cell] = defaultdict(_Cell)
    for trace in review.observed.traces:
        for run in trace.runs:
            if run.started:
                _add_run(cells, row_of[run.worker], trace, run, review.begin, step)
    return cells


def _add_run(
    cells: dict[tuple[int, int], _Cell],
    row: int,
    trace: Trace,
    run: Run,
    begin: float,
    step: float,
) -> None:
    first = min(max(0, int((run.started - begin) / step)), _CELLS - 1)
    last = min(max(first, int((run.ended - begin) / step)), _CELLS - 1)
    for column in range(first, last + 1):
        cell = cells[row, column]
        left = begin + column * step
        cell.busy += max(0.0, min(run.ended, left + step) - max(run.started, left))
        if run.seconds >= cell.longest:
            cell.longest, cell.task = run.seconds, trace.called
    cells[row, first].begun += 1
    cells[row, last].failed += run.how == "failed"
    cells[row, last].lost += run.how == "lost"


def _cell_value(
    cell: _Cell, row: str, column: int, step: float, slots: int, axis: _TimeAxis
) -> Spec:
    left = axis.begin + column * step
    busy = min(1.0, cell.busy / (step * slots))
    return {
        "row": row,
        "a": axis.at(left),
        "b": axis.at(left + step),
        "busy": round(busy, 3),
        "share": f"{busy:.0%}",
        "begun": cell.begun,
        "task": cell.task,
        "longest": duration(cell.longest),
        "failed": cell.failed,
        "lost": cell.lost,
        "how": "lost" if cell.lost else "failed",
    }


# --- tasks -------------------------------------------------------------------------


def chosen_tasks(traces: list[Trace]) -> list[Trace]:
    """All tasks if they are few; otherwise the most telling ones, in submission order."""
    if len(traces) <= _TASKS:
        return traces
    telling = sorted(traces, key=_telling, reverse=True)
    return sorted(telling[:_TASKS], key=lambda trace: trace.place)


def _telling(trace: Trace) -> tuple[int, bool, float]:
    return trace.losses, trace.state == "failed" and len(trace.runs) > 1, trace.seconds


def _tasks(review: Review, axis: _TimeAxis) -> Chart:
    traces = review.observed.traces
    chosen = chosen_tasks(traces)
    values = [part for trace in chosen for part in _parts(trace, axis)]
    names = [trace.task_id for trace in chosen]
    spec = _chart(
        {"step": _step(len(names))},
        values,
        mark={"type": "bar", "height": {"band": 0.8}},
        encoding={
            "y": _rows(names, "task"),
            "x": axis.encoding(),
            "x2": {"field": "b"},
            "color": _colours(value["how"] for value in values),
            "tooltip": _ATTEMPT_HINTS,
        },
    )
    which = (
        "All tasks"
        if len(chosen) == len(traces)
        else f"{len(chosen)} of {len(traces):,} tasks (lost workers first, then longest run times)"
    )
    caption = f"{which}, each from being stored to its end, with every attempt."
    return Chart(name="tasks", title="What happened to tasks", caption=caption, spec=spec)


def _parts(trace: Trace, axis: _TimeAxis) -> Iterator[Spec]:
    """Waits and attempts of a task, one after the other."""
    common = {"row": trace.task_id, "task": trace.called}
    for run in trace.runs:
        shared = {**_attempt(trace, run, axis), **common}
        began = run.started or run.ended
        yield {
            **shared,
            "a": axis.at(run.since),
            "b": axis.at(run.claimed),
            "how": "waiting",
            "ran": "-",
        }
        yield {
            **shared, "a": axis.at(run.claimed), "b": axis.at(began), "how": "claimed",
            "ran": "-", "waited": duration(max(0.0, began - run.since)),
        }  # fmt: skip
        if run.started:
            yield shared
    since = trace.runs[-1].ended if trace.runs else trace.stored
    if trace.over > since and trace.state in ("pending", "cancelled"):
        yield {
            **common, "a": axis.at(since), "b": axis.at(trace.over), "attempt": "-", "worker": "-",
            "how": "waiting", "waited": duration(trace.over - since), "ran": "-",
        }  # fmt: skip


# --- over time ---------------------------------------------------------------------


def _done(review: Review, axis: _TimeAxis) -> Chart:
    values: list[Spec] = []
    for stretch in review.stretches:
        for how, count in (("finished", stretch.finished), ("failed", stretch.failed)):
            if how == "finished" or review.counts["failed"]:
                values.append({"a": axis.at(stretch.end), "n": count, "how": how})
    spec = _lines(
        values,
        axis,
        {"finished": "var(--completed)", "failed": "var(--failed)"},
        "tasks",
    )
    caption = "A straight line means a steady pace, a long flat end means stragglers."
    return Chart(name="done", title="Tasks done", caption=caption, spec=spec, half=True)


def _live(review: Review, axis: _TimeAxis) -> Chart:
    values: list[Spec] = []
    for stretch in review.stretches:
        for how, count in (("live", stretch.live), ("busy", stretch.busy)):
            values.append({"a": axis.at(stretch.end), "n": round(count, 2), "how": how})
    wanted = review.observed.manifest.workers * review.observed.manifest.spec.slots
    colours = {"live": "var(--claimed)", "busy": "var(--running)"}
    spec = _lines(values, axis, colours, "slots of workers")
    caption = f"The gap between the lines was paid for but unused; {wanted} slots are wanted."
    return Chart(name="live", title="Live workers", caption=caption, spec=spec, half=True)


def _lines(values: list[Spec], axis: _TimeAxis, colours: dict[str, str], title: str) -> Spec:
    present = {value["how"] for value in values}
    domain = [how for how in colours if how in present]
    hover = {
        "name": "near",
        "select": {
            "type": "point",
            "fields": ["a"],
            "nearest": True,
            "on": "pointerover",
            "clear": "pointerout",
        },
    }
    colour = {
        "field": "how",
        "type": "nominal",
        "scale": {"domain": domain, "range": [colours[how] for how in domain]},
    }
    return _chart(
        190,
        values,
        encoding={
            "x": axis.encoding(),
            "y": {"field": "n", "type": "quantitative", "title": title,
                  "axis": {"tickCount": 5, "tickMinStep": 1, "format": "~s"}},
            "color": colour,
        },
        layer=[
            {"mark": {"type": "area", "line": {"strokeWidth": 2}, "fillOpacity": 0.15,
                      "interpolate": "step-before", "stack": None},
             "encoding": {"y": {"field": "n", "type": "quantitative", "stack": None}}},
            {"params": [hover],
             "mark": {"type": "point", "filled": True, "size": 50, "tooltip": True},
             "encoding": {
                 "opacity": {"condition": {"param": "near", "empty": False, "value": 1},
                             "value": 0},
                 "tooltip": [{"field": "a", "title": axis.unit_name, "format": ".3~f"},
                             *_hints(how="", n="number")]}},
        ],
    )  # fmt: skip


# --- histograms --------------------------------------------------------------------


def _run_times(review: Review) -> Chart:
    traces = [t for t in review.observed.traces if t.runs and t.runs[-1].started]
    seconds = [(trace.seconds, trace.runs[-1].how) for trace in traces]
    spread = review.runs
    caption = (
        f"Half of them ran {duration(spread.median)} or less, 95 of 100 "
        f"{duration(spread.high)} or less, the longest {duration(spread.most)}."
    )
    return Chart(
        name="runs",
        title="Run times",
        caption=caption,
        spec=_histogram(seconds, "run time"),
        half=True,
    )


def _wait_times(review: Review) -> Chart:
    seconds = [(t.waited, "waiting") for t in review.observed.traces if t.state != "cancelled"]
    spread = review.waits
    caption = (
        f"From being stored to starting: half waited {duration(spread.median)} or less, "
        f"95 of 100 {duration(spread.high)} or less, the longest {duration(spread.most)}."
    )
    return Chart(
        name="waits",
        title="Time in the queue",
        caption=caption,
        spec=_histogram(seconds, "wait"),
        half=True,
    )


def _histogram(seconds: list[tuple[float, str]], title: str) -> Spec:
    edges = _edges([value for value, _ in seconds])
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for value, how in seconds:
        counts[_bar_of(value, edges), how] += 1
    values = [
        {
            "bar": bar,
            "n": n,
            "how": how,
            "range": f"{duration(edges[bar])} to {duration(edges[bar + 1])}",
        }
        for (bar, how), n in sorted(counts.items())
    ]
    names = [duration(edge) for edge in edges]
    colour = _colours(how for _, how in seconds)
    if len(colour["scale"]["domain"]) < 2:
        colour["legend"] = None
    bars = len(edges) - 1
    return _chart(
        190,
        values,
        transform=[{"calculate": "datum.bar + 1", "as": "next"}],
        mark={"type": "bar", "stroke": "var(--paper)", "strokeWidth": 1},
        encoding={
            "x": {"field": "bar", "type": "quantitative", "title": title,
                  "bin": {"binned": True, "step": 1},
                  "scale": {"domain": [0, bars], "nice": False},
                  "axis": {"grid": False, "labelExpr": f"{names!r}[datum.value]",
                           "values": list(range(0, bars + 1, bars // 6)),
                           "labelOverlap": "greedy", "labelFlush": True}},
            "x2": {"field": "next"},
            "y": {"field": "n", "type": "quantitative", "title": "tasks",
                  "axis": {"tickCount": 5, "tickMinStep": 1, "format": "~s"}},
            "color": colour,
            "tooltip": _hints(range=title, how="", n="tasks"),
        },
    )  # fmt: skip


def _edges(values: list[float]) -> list[float]:
    """Bounds of bars: equal, or growing by a constant factor if values differ a hundredfold."""
    least, most = max(min(values, default=0.0), 1e-3), max([*values, 2e-3])
    most *= 1.0001
    if most / least < 100:
        least = 0.0 if least < most / 3 else least
        return [least + (most - least) * i / _BARS for i in range(_BARS + 1)]
    factor = (most / least) ** (1 / _BARS)
    return [0.0, *(least * factor**i for i in range(1, _BARS + 1))]


def _bar_of(value: float, edges: list[float]) -> int:
    return min(max(0, bisect_right(edges, value) - 1), len(edges) - 2)

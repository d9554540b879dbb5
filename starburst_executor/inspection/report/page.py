"""The report as one HTML page that needs no network or server: it contains the drawing library.

Text from users and tasks (names, errors, tracebacks) is always escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path

import msgspec

from starburst_executor.formatting import dollars, duration, utc
from starburst_executor.inspection.report.charts import Chart, charts
from starburst_executor.inspection.report.review import Loss, Review, Stay, observe, review
from starburst_executor.inspection.tasks import TaskGroup
from starburst_executor.protocol.session import Session

__all__ = ["headline", "html", "library", "write"]

_SLOWEST = 12
_MOST_WORKERS = 40
_MOST_GROUPS = 25
_LONGEST_TEXT = 4000  # characters of a traceback


@cache
def library() -> str:
    """The JavaScript that draws the charts: Vega, Vega-Lite and Vega-Embed.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a report needs the package vl-convert-python, which contains the library that draws "
            "its charts: pip install 'starburst-executor[report]'",
            name=error.name,
        ) from error
    return javascript_bundle("window.vegaEmbed = vegaEmbed;")


def write(session: Session, path: str | Path) -> Review:
    """Write the report of a session into one self-contained HTML file; return what it shows.

    Raises:
        SessionNotFound: there is no such session.
        ModuleNotFoundError: the drawing library is not installed.
        OSError: the file cannot be written.
    """
    drawing = library()  # before reading the session: it may be missing
    reviewed = review(observe(session))
    Path(path).write_text(html(reviewed, drawing), encoding="utf-8")
    return reviewed


def html(review: Review, library: str) -> str:
    """The page.

    Args:
        review: What it shows.
        library: The JavaScript that `library` returned.
    """
    manifest = review.observed.manifest
    drawn = charts(review) if review.observed.traces else []
    name = manifest.name or manifest.session_id
    body = [
        _head(review),
        _cards(review),
        *_figures(drawn),
        _losses(review),
        _failures(review),
        _slowest(review),
        _workers(review),
        _cost(review),
        _foot(review),
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)} - starburst report</title>",
            f"<style>{_file('page.css')}</style></head><body>",
            *body,
            f'<script type="application/json" id="charts">{_json(drawn)}</script>',
            f"<script>{_inert(library)}</script>",
            f'<script type="module">{_file("page.js")}</script>',
            "</body></html>",
        ]
    )


def _file(name: str) -> str:
    return files("starburst_executor").joinpath(name).read_text(encoding="utf-8")


def _json(drawn: Iterable[Chart]) -> str:
    text = msgspec.json.encode({chart.name: chart.spec for chart in drawn}).decode()
    return text.replace("<", "\\u003c")  # so that nothing in it can end the script


def _inert(script: str) -> str:
    return script.replace("</script", "<\\/script")


# --- in words ----------------------------------------------------------------------


def headline(review: Review) -> tuple[str, str]:
    """Whether it was worth it and what held it back, in a sentence; and what to do about it."""
    total = len(review.observed.traces)
    if not total:
        return "Nothing was submitted to this session.", ""
    if not review.work.useful:
        return f"None of {_tasks(total)} has started.", _held_back(review)
    finished = sum(review.counts[state] for state in ("completed", "failed", "cancelled"))
    what = _tasks(total) if finished == total else f"{finished:,} of {_tasks(total)} so far"
    did = f"{what} took {_spoken(review.seconds)} for {_spoken(review.work.useful)} of work"
    return f"{did}: {_pace(review.speedup)}.", _held_back(review)


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count:,} tasks"


def _spoken(seconds: float) -> str:
    """A duration for a sentence, where `7:10` could be minutes or hours."""
    if seconds < 59.5:
        return duration(seconds)
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second} s" if second else f"{minutes} min"
    hours, minute = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minute} min" if minute else f"{hours:,} h"


def _prose(text: str) -> str:
    """Our own text as HTML, with backquoted parts as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _pace(speedup: float) -> str:
    if speedup >= 1.15:
        return f"{speedup:.3g} times as fast as running them one after another"
    if speedup >= 0.87:
        return "no faster than running them one after another"
    return "slower than running them one after another"


def _held_back(review: Review) -> str:
    share = review.work.efficiency
    busy = f"Workers spent {share:.0%} of their time running tasks (efficiency {share:.2f})."
    worst = review.worst
    if worst is None:
        return busy
    if share >= 0.9 and worst.seconds < 0.1 * review.work.paid:
        return f"{busy} Little held it back; most of the rest went to {worst.label}."
    cost = f"{_spoken(worst.seconds)} of slot time"
    return f"{busy} What held it back most: {worst.label} ({cost}). {worst.advice}"


def _head(review: Review) -> str:
    manifest = review.observed.manifest
    name = f"{escape(manifest.name)}, session " if manifest.name else "Session "
    sentence, advice = headline(review)
    when = f"{_time(review.begin)} to {_time(review.end)} UTC"
    return (
        f"<header><h1>{name}{escape(manifest.session_id)}</h1>"
        f'<p class="soft">{escape(str(manifest.state))}, {when}, by {escape(manifest.owner)}, '
        f"in {escape(review.observed.store)}</p>"
        f'<p class="headline" id="headline">{escape(sentence)}</p>'
        f'<p class="advice" id="advice">{_prose(advice)}</p></header>'
    )


def _cards(review: Review) -> str:
    counts = review.counts
    stays = review.observed.stays
    unfinished = counts["pending"] + counts["claimed"] + counts["running"]
    cards = [
        (f"{counts['completed']:,}", "completed", False),
        (f"{counts['failed']:,}", "failed", counts["failed"] > 0),
        (f"{unfinished:,}", "unfinished", False),
        (f"{review.retried:,}", "took more than one attempt", False),
        (f"{review.lost:,}", "attempts lost with a worker", review.lost > 0),
        (_spoken(review.seconds), "from first to last", False),
        (f"{review.speedup:.3g}x", "as fast as one by one", False),
        (f"{review.work.efficiency:.0%}", "efficiency", False),
        (f"{len(stays):,}", "workers", False),
        (_spoken(sum(stay.seconds for stay in stays)), "worker time", False),
    ]
    if counts["cancelled"]:
        cards.insert(2, (f"{counts['cancelled']:,}", "cancelled", False))
    if review.bill is not None:
        label = "spent, over its alert" if review.bill.alert else "spent"
        cards.append((str(review.bill), label, review.bill.alert))
    parts = [
        f'<div class="card"><b{" class=bad" if bad else ""}>{value}</b><span>{label}</span></div>'
        for value, label, bad in cards
    ]
    return f'<section class="cards">{"".join(parts)}</section>'


# --- figures and tables ------------------------------------------------------------


def _figures(drawn: list[Chart]) -> list[str]:
    """Charts one below the other, half-width ones in pairs."""
    parts = [_figure(chart) for chart in drawn if not chart.half]
    pairs = [_figure(chart) for chart in drawn if chart.half]
    return [*parts, f'<div class="pair">{"".join(pairs)}</div>'] if drawn else []


def _figure(chart: Chart) -> str:
    return (
        f"<figure><h2>{escape(chart.title)}</h2><figcaption>{escape(chart.caption)}</figcaption>"
        f'<div class="chart" id="{chart.name}" role="img" '
        f'aria-label="{escape(chart.title)}"></div></figure>'
    )


def _table(name: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML already; a column is a heading and a class."""
    head = "".join(f'<th class="{kind}">{heading}</th>' for heading, kind in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{cell}</td>' for cell, (_, kind) in zip(row, columns, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, note: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="soft">{escape(note)}</p>{content}</section>'


def _losses(review: Review) -> str:
    losses = [loss for loss in review.losses if loss.seconds >= 0.0005]
    if not losses:
        return ""
    columns = [
        ("lost to", "text"),
        ("slot time", "number"),
        ("of worker time", "number"),
    ]
    note = (
        "Time in which slots of workers could have run tasks but did not, or in which workers "
        "were missing."
    )
    rows = [
        (
            f'{escape(loss.label)}<br><span class="soft">{_prose(loss.advice)}</span>',
            duration(loss.seconds),
            _share(loss, review.work.paid),
        )
        for loss in losses
    ]
    return _section("What held it back", note, _table("losses", columns, rows))


def _share(loss: Loss, paid: float) -> str:
    return "-" if loss.name == "missing" or not paid else f"{loss.seconds / paid:.1%}"


def _failures(review: Review) -> str:
    groups = review.observed.failures
    if not groups:
        return ""
    failed = review.counts["failed"]
    note = f"{_tasks(failed)} failed, grouped by where; the largest group first."
    if review.observed.grouped < failed:
        note += f" The first {review.observed.grouped:,} were read."
    columns = [("count", "number"), ("error", "text"), ("tasks", "text")]
    rows = [_failure(group) for group in groups[:_MOST_GROUPS]]
    return _section("Failures", note, _table("failures", columns, rows))


def _failure(group: TaskGroup) -> tuple[str, str, str]:
    text = escape(str(group.error)[:_LONGEST_TEXT])
    details = "\n".join(part for part in (group.error.traceback, group.error.stderr) if part)
    if details:
        text = (
            f"<details><summary>{text}</summary>"
            f"<pre>{escape(details[-_LONGEST_TEXT:])}</pre></details>"
        )
    more = ", ..." if group.count > len(group.task_ids) else ""
    return f"{group.count:,}", text, "<br>".join(map(escape, group.names)) + more


def _slowest(review: Review) -> str:
    ran = [trace for trace in review.observed.traces if trace.seconds]
    if not ran:
        return ""
    slowest = sorted(ran, key=lambda trace: -trace.seconds)[:_SLOWEST]
    columns = [
        ("task", "name"), ("name", "text"), ("ran", "number"), ("waited", "number"),
        ("attempts", "number"), ("state", "name"), ("worker", "name"),
    ]  # fmt: skip
    rows = [
        (
            escape(trace.task_id),
            escape(trace.name or "-"),
            duration(trace.seconds),
            duration(trace.waited),
            str(trace.runs[-1].number),
            trace.state,
            escape(trace.runs[-1].worker),
        )
        for trace in slowest
    ]
    note = "Times of the last attempt."
    return _section("Slowest tasks", note, _table("slowest", columns, rows))


def _workers(review: Review) -> str:
    stays = review.observed.stays
    if not stays:
        return ""
    worked = _by_worker(review)
    columns = [
        ("", "number"), ("worker", "name"), ("host", "name"), ("joined after", "number"),
        ("lived", "number"), ("busy", "number"), ("attempts", "number"), ("lost", "number"),
        ("left", "text"),
    ]  # fmt: skip
    numbered = list(enumerate(stays, 1))
    shown = sorted(numbered, key=lambda one: (not worked[one[1].worker].lost, one[0]))
    rows = [
        _worker(number, stay, worked[stay.worker], review.begin)
        for number, stay in sorted(shown[:_MOST_WORKERS], key=lambda one: one[0])
    ]
    note = "In order of arrival."
    if len(rows) < len(stays):
        note = f"{len(rows)} of {len(stays):,}: those that were lost, then the first to arrive."
    return _section("Workers", note, _table("stays", columns, rows))


class _Worked:
    """What one worker did."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.attempts = 0
        self.lost = 0


def _by_worker(review: Review) -> dict[str, _Worked]:
    worked = {stay.worker: _Worked() for stay in review.observed.stays}
    for trace in review.observed.traces:
        for run in trace.runs:
            one = worked[run.worker]
            one.seconds += run.seconds
            one.attempts += 1
            one.lost += run.how == "lost"
    return worked


def _worker(number: int, stay: Stay, worked: _Worked, begin: float) -> tuple[str, ...]:
    share = worked.seconds / (stay.seconds * stay.slots) if stay.seconds else 0.0
    lost = f'<span class="bad">{worked.lost}</span>' if worked.lost else "0"
    return (
        str(number),
        escape(stay.worker),
        escape(stay.host or "-"),
        duration(max(0.0, stay.started - begin)),
        duration(stay.seconds),
        f"{min(1.0, share):.0%}",
        str(worked.attempts),
        lost,
        escape(stay.why or "live"),
    )


# --- cost --------------------------------------------------------------------------


def _cost(review: Review) -> str:
    """Requests, who counted them, and dollars if anything costs money."""
    rows = [*_compute_rows(review), *_request_rows(review), *_total_rows(review)]
    columns = [("", "name"), ("amount", "number"), ("dollars", "number"), ("source", "text")]
    note = (
        f"Writes are PUT, COPY, POST and LIST requests, reads are GET and HEAD. {_priced(review)}"
    )
    return _section("Requests and cost", note, _table("cost", columns, rows))


def _priced(review: Review) -> str:
    if review.bill is not None:
        return (
            f"Dollars are calculated with {review.bill.prices}, and exclude storage, logs, traffic "
            "and taxes."
        )
    if review.observed.manifest.spec.launcher == "local" and not _on_s3(review):
        return "Workers on this machine and a directory cost nothing."
    return "The cost is unknown: no prices are stored with the session."


def _compute_rows(review: Review) -> list[tuple[str, ...]]:
    bill = review.bill
    lived = sum(s.billed.seconds if s.billed else s.seconds for s in review.observed.stays)
    if bill is None or not bill.vcpu_seconds:
        local = review.observed.manifest.spec.launcher == "local"
        how = "workers on this machine cost nothing extra" if local else "not priced"
        return [("worker time", duration(lived), "-", how)]
    how = "to each worker's last heartbeat; whole seconds, at least a minute each"
    return [
        ("worker time", duration(bill.worker_seconds), dollars(bill.compute), how),
        ("vCPU hours", f"{bill.vcpu_seconds / 3600:,.3g}", "", "in the sum above"),
        ("GB hours", f"{bill.gb_seconds / 3600:,.3g}", "", "in the sum above"),
    ]  # fmt: skip


def _request_rows(review: Review) -> list[tuple[str, ...]]:
    rate = review.observed.manifest.rate
    rows: list[tuple[str, ...]] = []
    for who, made in (("workers", review.worker_requests), ("clients", review.client_requests)):
        how = "counted by each of them" if made.counted else "estimated: not all have reported"
        for kind, count, each in (
            ("writes", made.writes, rate.write if rate else 0.0),
            ("reads", made.reads, rate.read if rate else 0.0),
        ):
            price = dollars(count * each) if each else "-"
            rows.append((f"{kind} of {who}", f"{count:,}", price, how))
    return rows


def _total_rows(review: Review) -> list[tuple[str, ...]]:
    bill = review.bill
    if bill is None:
        return []
    live = f"{dollars(bill.hourly)} an hour now" if bill.hourly else ""
    return [("total", "", dollars(bill.total), live)]


def _on_s3(review: Review) -> bool:
    return review.observed.store.startswith("s3:")


def _foot(review: Review) -> str:
    observed = review.observed
    return (
        f'<p class="soft"><small>As of {_time(observed.now)} UTC. Efficiency is the time in which '
        "slots ran attempts that counted, divided by all the time that slots existed between the "
        "first task and the last. The times at which tasks were stored are the store's, on S3 to "
        "the second; all others are by the workers' clocks.</small></p>"
    )


def _time(seconds: float) -> str:
    return f"{utc(seconds):%Y-%m-%d %H:%M:%S}"

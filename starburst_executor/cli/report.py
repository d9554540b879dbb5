"""The report verb: writes an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from starburst_executor.cli.exits import Exit, Failed
from starburst_executor.cli.options import at_session, json_option, session_argument, store_option
from starburst_executor.cli.output import document, echo
from starburst_executor.errors import StarburstError

if TYPE_CHECKING:
    from starburst_executor.inspection.report.review import Review

__all__ = ["VERBS"]


@click.command()
@session_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The file to write.",
)
@store_option
@json_option
def report(id: str, output: Path, store: str | None, as_json: bool) -> None:
    """Write one HTML page about a session, and print a summary.

    The page needs no network. It shows a timeline of workers and tasks, throughput, run times and
    waits, failures, where time was lost, requests and cost. You can write it while the session is
    at work.
    """
    from starburst_executor.inspection.report.page import headline, write

    with at_session(store, id) as session:
        try:
            review = write(session, output)
        except StarburstError:
            raise  # some are OSErrors too, and have their own exit code
        except (ModuleNotFoundError, OSError) as error:
            raise Failed(str(error), Exit.OTHER) from error
    sentences = headline(review)
    if as_json:
        echo(document("report", _summary(review, output, sentences)))
        return
    for sentence in sentences:
        if sentence:
            echo(sentence)
    echo(f"Written to {output}.")


def _summary(review: Review, output: Path, sentences: tuple[str, str]) -> dict[str, object]:
    """The page's figures; times in seconds."""
    return {
        "session_id": review.observed.manifest.session_id,
        "file": str(output),
        "headline": sentences[0],
        "held_back": sentences[1],
        "counts": dict(review.counts),
        "retried": review.retried,
        "lost": review.lost,
        "seconds": review.seconds,
        "speedup": review.speedup,
        "efficiency": review.work.efficiency,
        "slot_seconds": review.work.paid,
        "losses": {loss.name: loss.seconds for loss in review.losses},
        "waits": review.waits._asdict(),
        "runs": review.runs._asdict(),
        "requests": {
            "workers": review.worker_requests._asdict(),
            "clients": review.client_requests._asdict(),
        },
        "cost": review.bill,
    }


VERBS: dict[str, click.Command] = {"report": report}

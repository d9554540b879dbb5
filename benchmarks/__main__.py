"""Measure the figures in docs/explanation/benchmarks.md in one run, and print a table.

    python -m benchmarks [--only WORD] [--list] [--json FILE]

S3 rows run against a ministack that this starts, behind a proxy that adds latency to each reply;
`STARBURST_BENCHMARK_STORE=s3://bucket/prefix` uses another server (the usual AWS settings say
which), without added latency. Requests are counted by botocore's events in every process, and
compared with the proxy's count.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.rows import ROWS, Row


@click.command(help=__doc__)
@click.option("--only", help="Only the rows with this word in their name.")
@click.option("--list", "names_only", is_flag=True, help="Print the names of the rows.")
@click.option(
    "--json", "target", type=click.Path(path_type=Path), help="Also write the figures here."
)
def main(only: str | None, names_only: bool, target: Path | None) -> None:
    chosen = [row for row in ROWS if only is None or only in row.name]
    if names_only:
        click.echo("\n".join(row.name for row in chosen))
        return
    console = Console()
    table = Table(
        "what",
        "must reach",
        "reached",
        "",
        "detail",
        title=f"{platform.machine()}, Python {platform.python_version()}",
    )
    figures = []
    for row in chosen:
        console.log(row.name)
        for result in row.run():
            mark = "ok" if result.good else "MISSED"
            table.add_row(result.what, result.required, result.reached, mark, result.detail)
            figures.append(result.__dict__)
            console.log(
                f"{result.what}: {result.reached} ({result.required}) {mark} {result.detail}"
            )
    console.print(table)
    if target is not None:
        target.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()


__all__ = ["Row", "main"]

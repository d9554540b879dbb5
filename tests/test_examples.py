"""Each example runs, and prints what it is there to show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.markdown import ROOT
from tests.support.scripts import output_of

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def run_example(home_without_sessions: Path, tmp_path: Path) -> Callable[[str], str]:
    return lambda name: output_of(EXAMPLES / name, tmp_path)


def test_monte_carlo_prints_quantiles_in_order_and_a_histogram(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("monte_carlo.py")
    assert text.startswith("400 tasks, 8,000 years, ")
    quantiles = re.findall(r"(\d+) % end below +([\d,]+), and fell by less", text)
    values = [int(value.replace(",", "")) for _, value in quantiles]
    assert [int(percent) for percent, _ in quantiles] == [5, 25, 50, 75, 95]
    assert 80_000 < values[0] < values[2] < values[-1] < 140_000
    bars = [len(bar) for bar in re.findall(r"^ +[\d,]+ ?(#*)$", text, re.MULTILINE)]
    assert len(bars) == 15
    assert max(bars) == 50
    assert bars[0] < 10 > bars[-1]


def test_parameter_sweep_draws_fewer_infected_the_more_are_vaccinated(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("parameter_sweep.py")
    shades = " .:-=+*#%@"
    drawn = re.findall(r"^R0 \d\.\d \|(.{57})\|$", text, re.MULTILINE)
    assert len(drawn) == 11
    for row in drawn:
        darkness = [shades.index(cell) for cell in row]
        assert darkness == sorted(darkness, reverse=True)
    assert "209 parameter sets" in text
    assert "worst: R0 6.0, 0% vaccinated -> 99.7% infected" in text


def test_process_files_reads_every_file_once(run_example: Callable[[str], str]) -> None:
    text = run_example("process_files.py")
    lines = re.findall(r"^access-(\d\d)\.log +([\d,]+) ", text, re.MULTILINE)
    assert [int(day) for day, _ in lines] == list(range(1, 31))
    requests = sum(int(count.replace(",", "")) for _, count in lines)
    total = re.findall(r"\d{3}: ([\d,]+)", text.splitlines()[-1])
    assert requests == sum(int(count.replace(",", "")) for count in total)


def test_partial_collection_shows_early_results_and_then_all(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("partial_collection.py")
    counts = [int(count) for count in re.findall(r": (\d+) outcomes$", text, re.MULTILINE)]
    early, late = re.findall(r"^  (\d+, .*)$", text, re.MULTILINE)
    assert 12 <= counts[0] <= counts[1] == 14  # fewer than all, unless this machine stalls
    assert late.startswith(early)  # in the order of submission
    assert re.search(r"Progress: .* of 14\)", text)


def test_detach_attach_gets_the_results_in_another_process(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("detach_attach.py")
    left, came = re.findall(r"^process (\d+) (?:submitted|attached)", text, re.MULTILINE)
    assert left != came
    assert "attached to 200 tasks" in text
    assert "100.0% (200 of 200)" in text
    assert "longest path: 953 steps" in text


def test_error_handling_shows_each_failure_and_goes_on(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("error_handling.py")
    assert "1. raised in the task and here: ValueError(" in text
    assert text.count("killed by SIGABRT") == 2
    squares = ", ".join(f"{n}: {n * n}" for n in range(8))
    assert f"with retries: {{{squares}}}" in text
    assert "over its limit of 2 s" in text
    assert "12 outcomes, 4 of them failures" in text
    failures = re.findall(r"^   task 0-\d+ +(\w+)", text, re.MULTILINE)
    assert failures == ["ValueError", "TaskCrashed", "TaskCrashed", "TaskTimeout"]


def test_asyncio_gather_keeps_the_event_loop_free(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("asyncio_gather.py")
    assert " 664,579 primes below   10,000,000" in text
    assert "gave up on a task after half a second" in text
    assert "the event loop kept ticking: True" in text


# Libraries that people already run; what each script prints when it worked.


def test_joblib_grid_search_fits_on_workers(run_example: Callable[[str], str]) -> None:
    assert "27 fits of 1,797 images" in run_example("joblib_grid_search.py")


def test_dask_graph_counts_words_of_all_pages(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("dask_graph.py")
    assert "moon   66" in text
    assert "12 pages" in text


def test_scipy_workers_finds_the_frequency(run_example: Callable[[str], str]) -> None:
    assert "frequency   1.71 (true value 1.7)" in run_example("scipy_workers.py")


def test_adaptive_learner_says_how_often_it_looked(
    run_example: Callable[[str], str],
) -> None:
    assert "evaluations," in run_example("adaptive_learner.py")


def test_emcee_sampler_draws_samples(run_example: Callable[[str], str]) -> None:
    assert "480 samples" in run_example("emcee_sampler.py")


def test_tqdm_progress_reaches_the_end(run_example: Callable[[str], str]) -> None:
    text = run_example("tqdm_progress.py")
    assert "100/100" in text
    assert "40/40" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_listed_and_run_here(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    assert f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()
    assert f'run_example("{name}")' in Path(__file__).read_text()

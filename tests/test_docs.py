"""What is written for users holds: blocks and examples run, links lead somewhere, figures are the code's."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
import pytest

import starburst_executor
from starburst_executor import StarburstExecutor
from starburst_executor.cli import main
from starburst_executor.costs import estimate
from starburst_executor.costs.prices import TABLE_DATE, built_in, worker_hour
from starburst_executor.protocol.manifest import Intervals
from starburst_executor.protocol.worker_spec import WorkerSpec
from tests.support.servers import S3Server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
DOCS = ROOT / "docs"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")),
]


# --- reading Markdown ------------------------------------------------------------


def sections(text: str, level: str = "##+") -> dict[str, str]:
    """Heading -> what follows it, up to the next heading; blocks of code hold no headings."""
    found: dict[str, str] = {}
    title = ""
    fenced = False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(rf"({level}|#) (.+)", line)
        title = heading[2] if heading else title
        found[title] = found.get(title, "") + ("" if heading else line)
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    return (DOCS / name).read_text()


def rows(text: str) -> list[list[str]]:
    """The rows of all tables in a text, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [i for i, row in enumerate(cells) if set("".join(row)) <= set("-: ")]
    return [r for i, r in enumerate(cells) if i not in rules and i + 1 not in rules]


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def quick_start() -> list[str]:
    return blocks(sections(README, "##")["Quick start"], "bash")


# --- running things --------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs keep their sessions; none may be left there."""
    folder = tmp_path / "starburst"
    monkeypatch.setenv("STARBURST_HOME", str(folder))
    yield folder
    left = [path.name for path in folder.glob("store/sessions/*")]
    assert not left, f"sessions were left behind: {left}"


def output_of(script: Path, cwd: Path) -> str:
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert ended.stderr == ""
    return ended.stdout


@pytest.fixture
def run_example(home: Path, tmp_path: Path) -> Callable[[str], str]:
    return lambda name: output_of(EXAMPLES / name, tmp_path)


# --- examples --------------------------------------------------------------------


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
    assert "longest way down: 953 steps" in text


def test_error_handling_shows_each_failure_and_goes_on(
    run_example: Callable[[str], str],
) -> None:
    text = run_example("error_handling.py")
    assert "1. raised here as there: ValueError(" in text
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
    assert "the event loop ticked meanwhile: True" in text


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
    assert "frequency   1.71 (in truth 1.7)" in run_example("scipy_workers.py")


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


# --- the blocks ------------------------------------------------------------------

NOT_RUN = "# Not run by the tests"
END_OF_BLOCK = "<end of block>"

# Lets a program run its Bash blocks, which see its strings as variables.
BASH = """\
def bash(code):
    import os, subprocess
    known = {k: v for k, v in globals().items() if type(v) is str and k[0] != "_"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, env={**os.environ, **known})
"""


def parts(name: str) -> Iterator[tuple[str, str]]:
    """A page's programs, named: one for each heading; a tutorial is one as a whole."""
    text = (ROOT / name).read_text()
    if "tutorial/" in name:
        yield name, text
        return
    for title, part in sections(text).items():
        if (name, title) != ("README.md", "Quick start"):  # has tests of its own
            yield f"{name}: {title}", part


class Block(NamedTuple):
    kind: str
    code: str
    output: str = "..."


def runnable(text: str) -> list[Block]:
    """What is run, each with the output that the page shows after it."""
    found: list[Block] = []
    fence = r"^```(python|bash|output)\n(.*?)^```$"
    for kind, code in re.findall(fence, text, re.DOTALL | re.MULTILINE):
        if kind == "output":
            found[-1] = found[-1]._replace(output=code)
        elif not code.startswith(NOT_RUN):
            found.append(Block(kind, code))
    return found


PROGRAMS = {title: text for name in PAGES for title, text in parts(name) if runnable(text)}


def program(steps: list[Block]) -> str:
    code = [BASH] if any(step.kind == "bash" for step in steps) else []
    for step in steps:
        run = step.code if step.kind == "python" else f"bash({step.code!r})\n"
        code.append(f"{run}print({END_OF_BLOCK!r})\n")
    return "\n".join(code)


def matches(printed: str, shown: str) -> bool:
    pattern = ".*".join(map(re.escape, shown.strip().split("...")))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("title", PROGRAMS)
def test_a_program_of_a_page_runs_and_prints_what_the_page_says(
    title: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    steps = runnable(PROGRAMS[title])
    code = program(steps)
    if "s3://my-bucket" in code:
        server: S3Server = request.getfixturevalue("ministack")
        request.getfixturevalue("s3_env")(server)
        client = server.client()
        client.create_bucket(Bucket="my-bucket")
        client.close()
    commands = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # or Bash's output comes first
    script = tmp_path / "program.py"
    script.write_text(code)
    printed = output_of(script, tmp_path).split(f"{END_OF_BLOCK}\n")
    for step, text in zip(steps, printed, strict=False):
        assert matches(text, step.output), f"{text}\nis not\n{step.output}"


@pytest.mark.parametrize("name", PAGES)
def test_no_code_of_a_page_escapes_the_tests(name: str) -> None:
    """By another name of its language, or indented; and what is not run says why."""
    text = (ROOT / name).read_text()
    known = {"python", "bash", "output", "text", "toml", "{toctree}", "{eval-rst}"}
    fences = [line[3:] for line in text.splitlines() if line.startswith("```")]
    assert {fence.split(" ")[0] for fence in fences[::2]} <= known | {"{include}"}
    assert not set(fences[1::2]) - {""}
    assert not re.search(r"\n\n    [a-zA-Z$]", re.sub(r"(?ms)^```.*?^```", "", text))
    for kind in ("python", "bash"):
        for code in blocks(text, kind):
            if code.startswith(NOT_RUN):
                assert re.match(rf"{NOT_RUN}[:,] .+\.\n", code)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every link between pages is checked by this, and that docstrings can be rendered."""
    [command] = re.findall(r"sphinx-build (-EW .+) docs build/docs", README)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *command.split(), "docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    assert "StarburstExecutor.attach" in (tmp_path / "reference/api.html").read_text()


# --- Quick start and CI ----------------------------------------------------------


def test_quick_start_has_two_blocks_before_anything_else_is_asked() -> None:
    assert len(quick_start()) == 2
    before = README.partition("## Quick start")[0]
    assert "pip install" not in before
    assert not blocks(before, "(?:bash|sh|console)")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of this tree that a clone would have, and nothing else."""
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = ["git", "-c", f"safe.directory={ROOT}", *listing]
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    target = tmp_path / "clone"
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.mark.slow
def test_the_first_block_runs_in_a_clone_with_an_empty_home(clone: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    base = getattr(sys, "_base_executable", sys.executable)
    path = f"{Path(base).parent}{os.pathsep}{os.environ['PATH']}"
    scrubbed = ("PYTHON", "VIRTUAL_ENV", "XDG_", "COVERAGE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(scrubbed)}
    ended = subprocess.run(
        ["bash", "-c", quick_start()[0]],
        cwd=clone,
        env=env | {"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert ended.stdout.startswith("400 tasks, 8,000 years, ")
    assert "#" * 50 in ended.stdout
    assert not list(home.rglob("session.json"))


def test_ci_runs_the_second_block_of_the_readme_as_it_stands() -> None:
    """It is told to print what it would run, and prints the block."""
    printed = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == quick_start()[1]


# --- what is stated --------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    here = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", here.read_text()):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = here.parent / path if path else here
        assert target.exists(), f"{name} links to {link}"
        if heading:
            headings = {anchor(title) for title in sections(target.read_text())}
            assert heading in headings, f"{name} links to {link}"


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = [line for tree in blocks(page("index.md"), "{toctree}") for line in tree.split()]
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert pages - {"index"} <= set(listed)


def test_the_cost_formula_is_that_of_the_code() -> None:
    """Its prices, its table of requests, and the example computed from both."""
    text = page("explanation/costs.md")
    prices = built_in("us-east-1")
    [formula] = re.findall(r"cost = ([\d.]+) x \(PUTs \+ LISTs\) \+ ([\d.]+) x GETs", text)
    stated = [float(one) for one in formula]
    assert stated == pytest.approx([prices.write, prices.read])
    assert f"{TABLE_DATE:%Y-%m-%d}" in text
    table = {row[0]: row[1:] for row in rows(text)}
    alone = [int(n) for n in table["a task submitted while nothing else waits"]]
    busy = table["heartbeats and the like of a busy worker, a minute"]
    client = table["a client that waits for long tasks, a minute"]
    found = estimate.estimate_run(
        WorkerSpec(launcher="ecs"), prices, tasks=10_000, task_seconds=60, workers=100, startup=0,
    )  # fmt: skip
    minutes = 100
    writes = (
        10_000 * sum(alone[:2])
        + 100 * minutes * sum(int(n) for n in busy[:2])
        + minutes * int(client[1])
    )
    reads = 10_000 * alone[2] + 100 * minutes * int(busy[2]) + minutes * int(client[2])
    assert found.cost.requests == pytest.approx(writes * prices.write + reads * prices.read)
    [said] = re.findall(r"some ([\d,]+) PUTs and LISTs and ([\d,]+) GETs: \$(\d+\.\d+)", text)
    assert (writes // 1000, reads // 1000) == tuple(int(n.split(",")[0]) for n in said[:2])
    assert f"{found.cost.requests:.2f}" == said[2]


def test_limits_in_the_reference_are_those_of_the_code() -> None:
    stated = {row[0].strip("`"): row[1] for row in limits() if ", " not in row[0]}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(StarburstExecutor).parameters.items()
    }
    fields = {f.name: f.default for f in msgspec.structs.fields(Intervals)}
    words = {"none": "None", "CPUs of this machine": "None"}
    for name, value in stated.items():
        assert words.get(value, value) == str((defaults | fields)[name])


def test_the_check_of_an_account_costs_what_the_price_table_says() -> None:
    text = page("how-to/check-an-account.md")
    prices = built_in("us-east-1", use_spot=False)
    hour = worker_hour(WorkerSpec(launcher="ecs"), prices)
    assert f"6 x 5/60 x ${hour:.5f} = ${6 * 5 / 60 * hour:.4f}" in text
    for price in (prices.vcpu_hour, prices.gb_hour):
        assert f"${price}" in text
    assert f"${1000 * prices.write:.3f}" in text


def test_pairs_of_intervals_in_the_reference_are_those_of_the_code() -> None:
    pairs = [row for row in limits() if ", " in row[0]]
    stated = {
        name.strip("`"): float(value)
        for row in pairs
        for name, value in zip(row[0].split(", "), row[1].split(", "), strict=True)
    }
    fields = {f.name: f.default for f in msgspec.structs.fields(Intervals)}
    assert stated == {name: fields[name] for name in stated}
    alone = {row[0].strip("`") for row in limits() if ", " not in row[0]}
    assert fields.keys() <= stated.keys() | alone


def limits() -> list[list[str]]:
    found = rows(page("reference/limits.md"))
    assert found
    return found


PACKAGE = Path(starburst_executor.__file__).parent


def modules() -> dict[str, Path]:
    """Module -> its file; the command line counts as one."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if not name.startswith(("__", "cli.", "environment.")):
            found[name] = path
    return found


def test_the_map_of_the_code_has_every_module_once() -> None:
    table = [row[0].strip("`") for row in rows(code_map())]
    drawing = re.findall(r"[a-z][a-z0-9._]+", blocks(code_map(), "text")[0])
    for where, stated in (("table", table), ("drawing", drawing)):
        differing = set(stated) ^ set(modules())
        assert not differing, f"the {where} of modules differs in {differing}"
        assert len(stated) == len(set(stated))


def test_imports_point_down_the_map_of_the_code() -> None:
    lines = reversed(blocks(code_map(), "text")[0].splitlines())
    row = {
        name: number
        for number, line in enumerate(lines)
        for name in re.findall(r"[a-z][a-z0-9._]+", line)
    }
    for name in row.keys() & modules().keys():
        for imported in imports_of(modules()[name]):
            assert row.get(imported, 99) < row[name], f"{name} imports {imported}"


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a module imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, name = node.module.partition(".")
            if package == "starburst_executor":
                names = [name] if name else [alias.name for alias in node.names]
                found.update(name for name in names if not name.startswith(("cli", "environment.")))
    return found


def code_map() -> str:
    text = page("explanation/architecture.md")
    return sections(text)["Map of the code"].replace("(THE PROTOCOL)", "")


def test_commands_in_the_guide_are_those_of_the_command_line() -> None:
    table = rows(sections(page("how-to/watch.md"))["From a shell"])
    stated = [row[0].split()[1].strip("`") for row in table]
    assert sorted(stated) == sorted(main.list_commands(click.Context(main)))


def test_exceptions_named_in_the_guide_exist() -> None:
    table = rows(sections(page("how-to/handle-failures.md"))["Tell the kinds apart"])
    named = {row[0].strip("`") for row in table}
    assert len(named) == 5
    assert named <= set(starburst_executor.__all__)

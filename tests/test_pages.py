"""What the pages show runs, links lead somewhere, and the site builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.markdown import DOCS, PAGES, README, ROOT, anchor, blocks, page, sections
from tests.support.scripts import output_of
from tests.support.servers import S3Server

NOT_RUN = "# Not run by the tests"
END_OF_BLOCK = "<end of block>"

# Lets a program run its Bash blocks, which see its strings as variables.
BASH = """\
def bash(code):
    import os, subprocess
    known = {k: v for k, v in globals().items() if type(v) is str and k[0] != "_"}
    command = ["bash", "-euo", "pipefail", "-c", code]
    subprocess.run(command, check=True, env={**os.environ, **known})
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
    home_without_sessions: Path,
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

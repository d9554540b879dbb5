"""What the command shows of sessions that anybody may have written."""

from __future__ import annotations

import ast
import re
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

import starburst_executor.cli
from starburst_executor.cli.main import main
from starburst_executor.client import resubmit
from starburst_executor.formatting import printable
from starburst_executor.protocol import codec
from starburst_executor.protocol.keys import Batch
from starburst_executor.protocol.manifest import Heartbeat, LiveLog
from starburst_executor.protocol.outcome import Failure
from starburst_executor.protocol.session_prices import SessionPrices
from starburst_executor.protocol.task_names import Name
from starburst_executor.protocol.tasks_object import Queued, encode_tasks
from tests.support.command_line import Made, parsed, run

EVIL = "\x1b]0;owned\x07\x1b[35m\x1b[2J\x9b2J\r\x7f\u202eevil"
OURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def evil(directory_url: str) -> Made:
    """A session with escape sequences wherever there is text."""
    made = Made(directory_url)
    session = made.session
    function = session.tasks(made.batch).header.functions[0]
    more = [Queued(function, b"x", Name(EVIL, EVIL, EVIL))] * 3
    batch = Batch(0, 3, 3)
    session.put_batch(batch, encode_tasks(more, {}))
    made.amend(name=EVIL, owner=EVIL, package=EVIL, cost_alert=1e-9, rate=_prices())
    made.begin(worker=f"w-{EVIL.replace('/', '')}", count=2)
    failure = Failure(
        kind="raised", type=EVIL, message=EVIL, traceback=f"{EVIL}\n{EVIL}", stderr=EVIL
    )
    made.end(0, failure, stdout=f"{EVIL}\nmore\n", worker=f"w-{EVIL}")
    session.put_live_log(made.batch, 1, 1, LiveLog(stdout=EVIL, stderr=EVIL))
    beat = Heartbeat(worker="w-x", host=EVIL, reason=EVIL, reads=10**9, market=EVIL)
    session.store.put(session.key(f"workers/w-{EVIL}"), codec.encode(beat))
    session.store.put(session.key(f"ended/w-{EVIL}"), codec.encode(replace(beat, worker="w-y")))
    retries = resubmit._Retries(tasks={"0-2": EVIL})
    session.store.put(session.key("retries/x"), codec.encode(retries))
    session.store.put(f"sessions/{EVIL}/session.json", EVIL.encode())
    return made


def _prices() -> SessionPrices:
    return SessionPrices(read=1.0, market=EVIL, region=EVIL, source=EVIL, taken=date(2026, 1, 1))


READS = [
    ("list",), ("status", "ID"), ("tasks", "ID"), ("show", "ID", "0-0"), ("show", "ID", "0-2"),
    ("show", "ID", "0-3"), ("logs", "ID"), ("logs", "ID", "0-1"), ("errors", "ID"),
    ("collect", "ID"), ("report", "ID", "-o", "OUT"), ("status", "no-such"),
    ("logs", "ID", "--worker", EVIL),
]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [*READS, *((*words, "--json") for words in READS), ("prune", "--older-than", "1", "--dry-run")],
)
def test_no_control_sequence_of_others_reaches_the_terminal(
    evil: Made, tmp_path: Path, words: tuple[str, ...]
) -> None:
    known = {"ID": evil.id, "OUT": str(tmp_path / "report.html")}
    arguments = [known.get(word, word) for word in words]
    result = CliRunner().invoke(main, [*arguments, "--store", evil.store], color=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.output
    assert "\x1b[35m" not in result.output
    left = OURS.sub("", result.output)
    assert printable(left) == left


def test_a_session_that_cannot_be_read_is_a_row_that_says_so(directory_url: str) -> None:
    good = Made(directory_url, session_id="20250101-120000-bbbbbb")
    bad = "20250101-120000-aaaaaa"
    good.session.store.put(f"sessions/{bad}/session.json", b"{}")
    result = run("list", store=directory_url)
    rows = [line.split()[:4] for line in result.stdout.splitlines()[1:]]
    assert [bad, "-", "unreadable", "100%"] in rows
    assert [good.id, "-", "open", "0%"] in rows
    assert re.search(
        rf"{bad}: session.json cannot be read: .*missing required field", result.stderr
    )
    listed = {
        row["session_id"]: (row["state"], row["error"] or "")
        for row in parsed(run("list", "--json", store=directory_url).stdout, "sessions")
    }
    assert listed[good.id] == ("open", "")
    assert listed[bad][0] == "unreadable"
    assert "session.json cannot be read" in listed[bad][1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("queue/0000-00000003.99999999999/tasks", b""),
        ("queue/9999-00000003.1/tasks", b""),
        ("queue/0000-00000000.3/done.1.x", b""),
        ("queue/0000-00000000.3/done.99999999999.0.0", b""),
        ("queue/0000-00000000.3/requeued." + "9" * 200, b""),
        ("queue/0000-00000000.3/record", b'{"tasks":[{"claimed":1e300},{},{}]}'),
        ("retries/x", b'{"schema":1,"tasks":{"0-0":"0-1","0-1":"0-0"}}'),
        ("workers/w-1", b'{"worker":"w-1","started":1e300,"busy":1e308}'),
    ],
)
def test_a_crafted_object_breaks_no_list(directory_url: str, name: str, content: bytes) -> None:
    made = Made(directory_url)
    other = Made(directory_url, session_id="20250101-120000-bbbbbb")
    made.session.store.put(made.session.key(name), content)
    for verb in (["list"], ["tasks", made.id], ["status", made.id], ["errors", made.id]):
        result = run(*verb, store=directory_url)
        assert result.exception is None or isinstance(result.exception, SystemExit)
    listed = parsed(run("list", "--json", store=directory_url).stdout, "sessions")
    assert [(row["session_id"], row["total"]) for row in listed] == [(made.id, 3), (other.id, 3)]


@pytest.mark.parametrize("field", ["created", "deadline"])
@pytest.mark.parametrize("moment", ["1e300", "-1e300", "253402300800"])
def test_a_time_out_of_range_is_refused(directory_url: str, field: str, moment: str) -> None:
    made = Made(directory_url)
    key = made.session.key("session.json")
    got = made.session.store.get(key)
    assert got is not None
    content = re.sub(rb'("%s":)[^,]*' % field.encode(), rb"\g<1>" + moment.encode(), got.data)
    made.session.store.put(key, content)
    assert "unreadable" in run("list", store=directory_url).stdout
    assert f"$.{field}" in run("status", made.id, store=directory_url).stderr


def test_a_session_of_links_is_a_row_that_says_so(directory_url: str, tmp_path: Path) -> None:
    made = Made(directory_url)
    queue = Path(directory_url) / "sessions" / made.id / "queue"
    queue.rename(tmp_path / "elsewhere")
    queue.symlink_to(tmp_path / "elsewhere")
    result = run("list", store=directory_url)
    assert "unreadable" in result.stdout
    assert f"{queue} is a symbolic link" in result.stderr


def test_text_of_others_is_printed_through_echo_alone() -> None:
    """What is printed in other ways has no text of others."""
    own = {"output.py", "main.py", "deploy.py", "doctor.py", "planning.py"}
    folder = Path(starburst_executor.cli.__file__).parent
    direct = [
        f"{file.name}:{node.lineno}"
        for file in folder.glob("*.py")
        if file.name not in own
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in DIRECT
    ]
    assert direct == []


DIRECT = {"print", "click.echo", "click.secho", "click.style", "sys.stdout.write"}

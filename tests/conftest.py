"""Fixtures: a clean environment, stores and S3 servers to test on, and a look for leaks."""

from __future__ import annotations

import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import servers, together
from tests.support.recorder import call_recorder
from tests.support.servers import S3Server
from tests.support.together import WHY_PARTIAL

# The same examples each time, unless somebody asks for a search: --hypothesis-profile=long
settings.register_profile(
    "usual",
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "long", max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("usual")

_USUAL = "not aws and not chaos and not soak"

_LEAK_GRACE = 5.0  # seconds for what is already ending to end

LAST = "test_aws_calls.py"  # looks at the calls that all others made

LONGEST = (
    "test_ecs_end_to_end.py",
    "test_process.py",
    "test_joblib.py",
    "test_environment_sync.py",
    "test_shutdown.py",
    "test_examples.py",
    "test_protocol.py",
    "test_integrations.py",
    "test_attach.py",
    "test_autoscaler.py",
    "test_outages.py",
    "test_soak.py",
)
"""Begun first, so that no process is left with one of them when the others have ended."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Share the whole suite among all cores, and run a part of it in this process.

    One process more than there are cores: much of the time tests wait, for workers to start.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return (os.cpu_count() or 1) + 1 if whole else 0


def pytest_configure(config: pytest.Config) -> None:
    """Have every process note which calls of AWS it makes."""
    if _shares_a_run(config):
        return
    os.environ[call_recorder.FOLDER] = tempfile.mkdtemp(prefix="calls-")
    plugin = f"calls={call_recorder.__name__}"
    os.environ["BOTOCORE_EXPERIMENTAL__PLUGINS"] = plugin


def pytest_unconfigure(config: pytest.Config) -> None:
    if _shares_a_run(config):
        return
    shutil.rmtree(os.environ.pop(call_recorder.FOLDER), ignore_errors=True)


def _shares_a_run(config: pytest.Config) -> bool:
    """Whether another process started this one to run some of its tests."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest files first, and look at the calls after all other tests."""
    items.sort(key=_turn)
    files = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    lacking = files - {item.path.name for item in items}
    option = config.option
    narrowed = option.keyword or option.markexpr not in ("", _USUAL)
    if lacking:
        why = f"{len(lacking)} of {len(files)} files of tests were left out"
    elif narrowed or option.deselect or any("::" in arg for arg in config.args):
        why = "only some tests were chosen"
    else:
        why = ""
    config.stash[WHY_PARTIAL] = why


def _turn(item: pytest.Item) -> int:
    name = item.path.name
    if name == LAST:
        return len(LONGEST) + 1
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        together.note_end(failed=item.session.testsfailed > 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the rounds of chaos came to, all together."""
    counts: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                counts.update(dict(report.user_properties).get("chaos", {}))
    if counts:
        terminalreporter.section("chaos")
        for name in sorted(counts):
            terminalreporter.line(f"{name:<20} {counts[name]:>6}")


@pytest.fixture
def after_all_others(request: pytest.FixtureRequest) -> None:
    """Whatever process runs them, all tests of other files have ended."""
    items = request.session.items
    before = items.index(request.node)  # those of the same file too
    if together.wait_for(before) and not request.config.stash[WHY_PARTIAL]:
        request.config.stash[WHY_PARTIAL] = "tests failed before"


@pytest.fixture(autouse=True)
def clean_environment(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """No test sees the user's AWS account or settings, nor writes to the user's folders."""
    for name in list(os.environ):
        if name.startswith("STARBURST_"):
            monkeypatch.delenv(name)
    if request.node.get_closest_marker("aws"):
        return
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(autouse=True)
def no_leaks(clean_environment: None) -> Iterator[None]:
    """A test that leaves a thread or a child process behind fails."""
    threads, children = set(threading.enumerate()), _children()
    yield
    left_threads = [t for t in threading.enumerate() if t not in threads]
    left_threads = [t for t in left_threads if not t.daemon and not _ends(t)]
    left_children = [pid for pid in _children() - children if not _gone(pid)]
    assert not left_threads, f"the test left threads running: {left_threads}"
    assert not left_children, f"the test left child processes: {left_children}"


@pytest.fixture
def directory_url(tmp_path: Path) -> str:
    """The URL of a store in a directory that does not exist yet."""
    return str(tmp_path / "store")


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with servers.ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3_env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that points the AWS settings at a server, perhaps through a proxy's endpoint."""

    def use(server: S3Server, endpoint: str | None = None) -> None:
        for name, value in server.environment(endpoint).items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture(params=["directory", "ministack", "seaweedfs"])
def store_url(request: pytest.FixtureRequest, s3_env: Callable[..., None]) -> str:
    """The URL of an empty store of each kind that processes can share."""
    if request.param == "directory":
        url: str = request.getfixturevalue("directory_url")
        return url
    server: S3Server = request.getfixturevalue(request.param)
    s3_env(server)
    return server.fresh_url()


def _ends(thread: threading.Thread) -> bool:
    thread.join(_LEAK_GRACE)
    return not thread.is_alive()


def _children() -> set[int]:
    """Process ids of this process's children, without what whole runs share."""
    shared = servers.running | {
        multiprocessing.resource_tracker._resource_tracker._pid,  # type: ignore[attr-defined]
        multiprocessing.forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]
    }
    lists = Path("/proc/self/task").glob("*/children")
    found = {int(pid) for file in lists for pid in _text(file).split()}
    if not Path("/proc/self/task").exists():  # macOS
        found = _children_by_ps()
    return found - shared


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
        return ""


def _children_by_ps() -> set[int]:
    command = ["ps", "-axo", "pid=,ppid="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ps:
        table = ps.communicate()[0]
    rows = [[int(word) for word in line.split()] for line in table.splitlines()]
    return {pid for pid, parent in rows if parent == os.getpid()} - {ps.pid}


def _gone(pid: int) -> bool:
    """Whether a child ends, and is waited for, by itself; it is killed if not."""
    deadline = threading.Event()
    for _ in range(int(_LEAK_GRACE / 0.05)):
        if pid not in _children():
            return True
        deadline.wait(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


@pytest.fixture
def home_without_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs keep their sessions; none may be left there."""
    folder = tmp_path / "starburst"
    monkeypatch.setenv("STARBURST_HOME", str(folder))
    yield folder
    left = [path.name for path in folder.glob("store/sessions/*")]
    assert not left, f"sessions were left behind: {left}"

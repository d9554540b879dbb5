"""Workers on this machine: real processes, really killed; and what a worker may be asked to be."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import starburst_executor
from starburst_executor.config import data_home
from starburst_executor.errors import StarburstError
from starburst_executor.launchers.base import open_launcher
from starburst_executor.launchers.local import LocalLauncher, hold_lock
from starburst_executor.protocol.worker_spec import WorkerSpec, memory_mib
from starburst_executor.runtime import Signal, SystemRuntime

URL = "/some/store/sessions/s-abc"
OTHER_URL = "/some/store/sessions/s-xyz"
SLEEPER = (
    "/bin/sh",
    "-c",
    "exec sleep 600",
)  # dies of SIGTERM, as a worker without anything to hand back would

WORKER = """
import os, signal, sys, time
behaviour, ready = sys.argv[1:3]
if behaviour == "graceful":
    def leave(*_):
        print("leaving", flush=True)
        sys.exit()
    signal.signal(signal.SIGTERM, leave)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: print("not yet", flush=True))
if behaviour == "lingering":
    def let_go(*_):
        os.close(int(os.environ["STARBURST_LOCK_FD"]))
        time.sleep(0.1)  # as the kernel takes time to free a large memory
        os._exit(0)
    signal.signal(signal.SIGTERM, let_go)
if behaviour == "parent":
    from starburst_executor.launchers.local import hold_lock
    hold_lock()
    sleeper = os.posix_spawn("/bin/sleep", ["sleep", "600"], os.environ)  # closes no descriptor
    print(sleeper, flush=True)
with open(ready, "w") as file:
    file.write(f"{os.getpid()}\\n")
while True:
    signal.pause()
"""

CLIENT = """
import signal, sys
from pathlib import Path
from starburst_executor.launchers.local import LocalLauncher
folder, url, *command = sys.argv[1:]
print(*LocalLauncher(Path(folder), command).launch(url, 1), flush=True)
signal.pause()
"""


class Ready:
    """A pipe with a name, on which workers report their pids once they are set up."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ready"
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDWR)

    def pid(self) -> int:
        readable, _, _ = select.select([self.fd], [], [], 60)
        assert readable, "no worker reported in 60 s"
        digits = b""
        while not digits.endswith(b"\n"):
            digits += os.read(self.fd, 1)
        return int(digits)


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Ready]:
    pipe = Ready(tmp_path)
    yield pipe
    os.close(pipe.fd)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "workers"
    path.mkdir()
    yield path
    launcher = LocalLauncher(path)
    for url in (URL, OTHER_URL):
        launcher.stop(
            url, launcher.live(url) | launcher.ended(url), grace=0
        )  # ended ones may wait to be collected


def worker(behaviour: str, ready: Ready) -> list[str]:
    return [sys.executable, "-c", WORKER, behaviour, str(ready.path)]


def lock_of(folder: Path, worker_id: str) -> Path:
    (path,) = folder.glob(f"*/{worker_id}")
    return path


def wait_for_end(folder: Path, worker_id: str) -> None:
    """Return when the kernel has let go of the worker's lock."""
    with lock_of(folder, worker_id).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


# -- life and death


def test_launched_workers_are_live_at_once_and_have_ids_of_their_own(
    folder: Path,
) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    ids = launcher.launch(URL, 3)
    assert launcher.live(URL) == set(ids)
    assert launcher.ended(URL) == set()
    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"w-[a-z2-9]{10}", worker_id) for worker_id in ids)


def test_worker_gets_the_session_and_its_id_as_arguments(folder: Path) -> None:
    launcher = LocalLauncher(folder, ["/bin/echo", "worker"])
    (worker_id,) = launcher.launch(URL, 1)
    wait_for_end(folder, worker_id)
    assert launcher.log_tail(URL, worker_id) == f"worker {URL} --id {worker_id}\n"


def test_sessions_do_not_see_each_others_workers(folder: Path) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    (mine,) = launcher.launch(URL, 1)
    (other,) = launcher.launch(OTHER_URL, 1)
    launcher.stop(URL, grace=5)
    assert launcher.live(URL) == set()
    assert launcher.ended(URL) == {mine}
    assert launcher.live(OTHER_URL) == {other}


def test_session_without_workers_has_none(folder: Path) -> None:
    launcher = LocalLauncher(folder / "never made")
    assert launcher.live(URL) == launcher.ended(URL) == set()
    assert launcher.log_tail(URL, "w-unknown") == ""
    launcher.stop(URL, grace=5)
    launcher.stop(URL, ["w-unknown"], grace=5)
    launcher.forget(URL)


def test_worker_outlives_its_client_and_is_stopped_by_another_process(
    folder: Path, ready: Ready
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(folder), URL, *worker("plain", ready)],
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdout is not None
        worker_id = client.stdout.readline().strip()
        pid = ready.pid()
        client.kill()
    launcher = LocalLauncher(folder)
    assert launcher.live(URL) == {worker_id}
    assert os.getsid(pid) == pid  # closing the client's terminal does not reach it either
    launcher.stop(URL, grace=5)
    assert launcher.live(URL) == set()
    assert launcher.ended(URL) == {worker_id}


def test_worker_killed_with_9_has_ended_at_once(folder: Path, ready: Ready) -> None:
    launcher = LocalLauncher(folder, worker("plain", ready))
    (worker_id,) = launcher.launch(URL, 1)
    os.kill(ready.pid(), signal.SIGKILL)
    wait_for_end(folder, worker_id)
    assert launcher.ended(URL) == {worker_id}
    assert launcher.live(URL) == set()


def test_ended_worker_is_no_zombie_after_the_next_look(folder: Path, ready: Ready) -> None:
    launcher = LocalLauncher(folder, worker("plain", ready))
    launcher.launch(URL, 1)
    pid = ready.pid()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is one now
    LocalLauncher(folder).live(URL)  # another launcher of the same process does as well
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@pytest.mark.parametrize("behaviour", ["plain", "lingering"])
def test_stopped_worker_is_gone_and_no_zombie(folder: Path, ready: Ready, behaviour: str) -> None:
    launcher = LocalLauncher(folder, worker(behaviour, ready))
    launcher.launch(URL, 1)
    pid = ready.pid()
    launcher.stop(URL, grace=5)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_stop_lets_a_worker_leave_by_itself(folder: Path, ready: Ready) -> None:
    launcher = LocalLauncher(folder, worker("graceful", ready))
    (worker_id,) = launcher.launch(URL, 1)
    ready.pid()
    launcher.stop(URL, grace=60)
    assert launcher.log_tail(URL, worker_id) == "leaving\n"
    assert launcher.ended(URL) == {worker_id}


def test_stop_kills_a_worker_that_ignores_sigterm(folder: Path, ready: Ready) -> None:
    launcher = LocalLauncher(folder, worker("stubborn", ready))
    (worker_id,) = launcher.launch(URL, 1)
    ready.pid()
    launcher.stop(URL, grace=0.2)
    assert launcher.log_tail(URL, worker_id) == "not yet\n"  # it was asked first, once
    assert launcher.ended(URL) == {worker_id}


def test_stop_ends_only_the_workers_that_are_named(folder: Path) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    first, second, third = launcher.launch(URL, 3)
    launcher.stop(URL, [first, third], grace=5)
    assert launcher.live(URL) == {second}
    assert launcher.ended(URL) == {first, third}


def test_stop_spares_a_process_that_got_the_pid_of_an_ended_worker(
    folder: Path,
) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    (ended,) = launcher.launch(URL, 1)
    launcher.stop(URL, grace=5)
    (living,) = launcher.launch(URL, 1)
    lock_of(folder, ended).write_text(lock_of(folder, living).read_text())
    launcher.stop(URL, [ended], grace=0)
    assert launcher.live(URL) == {living}


def test_lock_is_not_inherited_by_what_the_worker_starts(folder: Path, ready: Ready) -> None:
    launcher = LocalLauncher(folder, worker("parent", ready))
    (worker_id,) = launcher.launch(URL, 1)
    pid = ready.pid()
    grandchild = int(launcher.log_tail(URL, worker_id))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert launcher.ended(URL) == {worker_id}
    finally:
        os.kill(
            grandchild, signal.SIGKILL
        )  # fails if it had ended: then this test would show nothing


CLIENT_WITHOUT_STREAMS = """
import os, sys
from pathlib import Path
from starburst_executor import StarburstExecutor
closed, store, target = sys.argv[1:]
for number in closed:
    os.close(int(number))
with StarburstExecutor(1, store=store) as executor:
    Path(target).write_text(str(executor.submit(abs, -7).result(60)))
"""


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_a_client_that_was_started_without_standard_streams_gets_workers(
    folder: Path, tmp_path: Path, closed: str
) -> None:
    target = tmp_path / "target"
    program = [sys.executable, "-c", CLIENT_WITHOUT_STREAMS, closed]
    subprocess.run([*program, tmp_path / "store", target], timeout=60, check=False)
    assert target.read_text() == "7"


WORKER_WITHOUT_STREAMS = """
import os
from starburst_executor.worker import process
free = os.dup(0)
os.close(free)
os.close(0)
os.close(2)
process._open_standard_files()
print(*(os.get_inheritable(number) for number in range(3)), os.dup(0) == free)
"""


def test_a_worker_that_was_started_without_standard_streams_opens_them() -> None:
    program = [sys.executable, "-c", WORKER_WITHOUT_STREAMS]
    ended = subprocess.run(program, capture_output=True, timeout=60, check=True)
    assert ended.stdout.split() == [b"True"] * 4


def test_nobody_takes_a_worker_that_is_being_started_for_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    seen: list[set[str]] = []

    def look_before_the_worker_is_locked(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            seen.append(LocalLauncher(folder).ended(URL))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", look_before_the_worker_is_locked)
    LocalLauncher(folder, SLEEPER).launch(URL, 2)
    assert seen == [set(), set()]


def test_two_who_look_at_once_do_not_take_each_other_for_a_worker(folder: Path) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    (worker_id,) = launcher.launch(URL, 1)
    launcher.stop(URL, grace=5)
    with lock_of(folder, worker_id).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # somebody else in the middle of a look
        assert launcher.ended(URL) == {worker_id}


def test_worker_writes_its_pid_if_its_client_could_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "w-1"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        os.set_inheritable(fd, True)
        monkeypatch.setenv("STARBURST_LOCK_FD", str(fd))
        hold_lock()
        assert lock.read_text() == f"{os.getpid()}\n"
        assert not os.get_inheritable(fd)
        assert "STARBURST_LOCK_FD" not in os.environ
        hold_lock()  # as in a worker that no launcher started
    finally:
        os.close(fd)


class QuickRuntime(SystemRuntime):
    """Waits take no time, but the clock believes they did."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed = 0.0

    def monotonic(self) -> float:
        return self.elapsed

    def signal(self) -> Signal:
        return QuickSignal(self)


class QuickSignal(threading.Event):
    def __init__(self, runtime: QuickRuntime) -> None:
        super().__init__()
        self.runtime = runtime

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.runtime.elapsed += timeout
        return False


def test_stop_names_a_worker_that_cannot_be_killed(folder: Path) -> None:
    launcher = LocalLauncher(folder, ["/bin/true"], QuickRuntime())
    (worker_id,) = launcher.launch(URL, 1)
    wait_for_end(folder, worker_id)
    lock = lock_of(folder, worker_id)
    lock.write_text("")  # a worker of another machine, say
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            StarburstError,
            match=rf"{worker_id} \(pid not known\).*another machine.*{lock.parent}",
        ):
            launcher.stop(URL, [worker_id], grace=5)


# -- what is left behind


def test_forget_removes_everything_about_ended_workers(folder: Path) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    launcher.launch(URL, 2)
    launcher.stop(URL, grace=5)
    launcher.forget(URL)
    assert list(folder.iterdir()) == []
    launcher.forget(URL)


def test_forget_keeps_workers_that_live_so_that_they_can_be_stopped(
    folder: Path,
) -> None:
    launcher = LocalLauncher(folder, SLEEPER)
    ended, living = launcher.launch(URL, 2)
    launcher.stop(URL, [ended], grace=5)
    launcher.forget(URL)
    assert launcher.ended(URL) == set()
    assert launcher.live(URL) == {living}


def test_log_tail_says_why_a_worker_died(folder: Path) -> None:
    launcher = LocalLauncher(
        folder,
        [
            sys.executable,
            "-c",
            "print('x' * 80 + '\\n' * 9000, flush=True); raise OSError('no disk')",
        ],
    )
    (worker_id,) = launcher.launch(URL, 1)
    wait_for_end(folder, worker_id)
    tail = launcher.log_tail(URL, worker_id)
    assert tail.endswith("OSError: no disk\n")
    assert "Traceback" in tail
    assert len(tail) <= 4096
    assert "x" * 80 not in tail


def test_worker_that_cannot_be_started_leaves_nothing_and_says_how_many_were(
    folder: Path,
) -> None:
    launcher = LocalLauncher(folder, ["/no/such/program"])
    with pytest.raises(FileNotFoundError, match="/no/such/program") as failure:
        launcher.launch(URL, 2)
    assert f"started 0 of 2 workers of {URL}" in failure.value.__notes__[0]
    assert launcher.live(URL) == launcher.ended(URL) == set()


# -- what the worker's interpreter sees


def test_worker_runs_the_code_of_its_client_whatever_lies_in_the_current_directory(
    folder: Path, tmp_path: Path
) -> None:
    source = Path(starburst_executor.__file__).parent
    copy = tmp_path / "copy" / "starburst_executor"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (cwd / "json.py").write_text("raise SystemExit('not the json of the standard library')")
    code = "import json, os, starburst_executor as s; print(s.__file__, os.getcwd())"
    client = (
        f"import sys; sys.path.insert(0, {str(copy.parent)!r})\n"
        "from pathlib import Path\n"
        "from starburst_executor.launchers.local import LocalLauncher\n"
        f"launcher = LocalLauncher(Path({str(folder)!r}), [sys.executable, '-P', '-c', {code!r}])\n"
        f"launcher.launch({URL!r}, 1)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", client], cwd=cwd, check=True)
    (log,) = folder.glob("*/*.log")
    wait_for_end(folder, log.stem)
    assert log.read_text() == f"{copy / '__init__.py'} {cwd}\n"


def test_default_command_keeps_the_current_directory_out_of_the_workers_path() -> None:
    assert LocalLauncher().command == (
        sys.executable,
        "-P",
        "-m",
        "starburst_executor",
        "worker",
    )


def test_installed_package_is_not_put_before_the_standard_library(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        site,
        "getsitepackages",
        lambda: [str(Path(starburst_executor.__file__).parent.parent)],
    )
    monkeypatch.setenv("PYTHONPATH", "/the/users/own")
    launcher = LocalLauncher(folder, ["/bin/sh", "-c", 'echo "$PYTHONPATH"'])
    (worker_id,) = launcher.launch(URL, 1)
    wait_for_end(folder, worker_id)
    assert launcher.log_tail(URL, worker_id) == "/the/users/own\n"


def test_data_home_is_named_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STARBURST_HOME", str(tmp_path))
    assert data_home() == tmp_path
    monkeypatch.setenv("STARBURST_HOME", "~/data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_home() == tmp_path / "data"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARBURST_HOME", "here")
    assert data_home() == tmp_path / "here"


def test_data_home_is_the_platforms_own_place_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STARBURST_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_home().name == "starburst_executor"
    assert data_home().is_relative_to(tmp_path)


def test_workers_are_noted_under_data_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STARBURST_HOME", str(tmp_path))
    launcher = LocalLauncher(command=SLEEPER)
    (worker_id,) = launcher.launch(URL, 1)
    launcher.stop(URL, grace=5)
    assert [path.name for path in (tmp_path / "workers").glob("*/*") if not path.suffix] == [
        worker_id
    ]


# -- specifications


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"launcher": "slurm"},
            ValueError,
            "launcher='slurm' is unknown.*'local', 'ecs'",
        ),
        ({"cpu": 0}, ValueError, "cpu=0 .*above 0"),
        ({"cpu": -1.5}, ValueError, "cpu=-1.5 .*above 0"),
        ({"cpu": float("nan")}, ValueError, "cpu=nan"),
        ({"cpu": float("inf")}, ValueError, "cpu=inf"),
        ({"cpu": "4"}, TypeError, "cpu='4' is of type str.*number of vCPUs"),
        ({"cpu": True}, TypeError, "cpu=True is of type bool"),
        ({"memory": 8}, TypeError, 'memory=8 is of type int.*\'?"2GB"'),
        ({"memory": "8"}, ValueError, "memory='8' is not an amount.*MB or GB"),
        ({"memory": "GB"}, ValueError, "memory='GB'"),
        ({"memory": "-2GB"}, ValueError, "memory='-2GB'"),
        ({"memory": "8 gigs"}, ValueError, "memory='8 gigs'"),
        ({"memory": "0GB"}, ValueError, "memory='0GB' is zero"),
        ({"memory": "9" * 400 + "GB"}, ValueError, "memory="),
        (
            {"launch_type": "LAMBDA"},
            ValueError,
            "launch_type='LAMBDA'.*'FARGATE', 'EC2'",
        ),
        ({"launch_type": "fargate"}, ValueError, "launch_type='fargate'"),
        ({"launch_type": "EC2"}, ValueError, "needs an instance_type.*c8a.xlarge"),
        (
            {"instance_type": "c8a.xlarge"},
            ValueError,
            "instance_type='c8a.xlarge'.*add launch_type=\"EC2\"",
        ),
        (
            {"launch_type": "EC2", "instance_type": "c8a"},
            ValueError,
            "instance_type='c8a'.*family, dot and size",
        ),
        ({"launch_type": "EC2", "instance_type": ""}, ValueError, "instance_type=''"),
        (
            {"launch_type": "EC2", "instance_type": 8},
            TypeError,
            "instance_type=8 is of type int",
        ),
        (
            {"use_spot": "yes"},
            TypeError,
            "use_spot='yes' is of type str.*True or False",
        ),
        ({"use_spot": 1}, TypeError, "use_spot=1"),
        ({"region": ""}, ValueError, "region='' is not a region"),
        ({"region": 1}, TypeError, "region=1 is of type int"),
        ({"slots": 0}, ValueError, "slots=0 .*at least 1"),
        ({"slots": 1.5}, TypeError, "slots=1.5 is of type float"),
        ({"slots": True}, TypeError, "slots=True is of type bool"),
        ({"cores": 4}, TypeError, "cores"),
    ],
)
def test_wrong_specification_is_refused_by_argument_value_and_remedy(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WorkerSpec(**options)


@pytest.mark.parametrize(
    "spec",
    [
        WorkerSpec(),
        WorkerSpec(cpu=0.25, memory="512MB", slots=4, region="eu-west-1"),
        WorkerSpec(launcher="ecs", launch_type="EC2", instance_type="c8a.xlarge", use_spot=True),
        WorkerSpec(launch_type="EC2", instance_type="u-6tb1.112xlarge"),
        WorkerSpec(launch_type="EC2", instance_type="m7i-flex.large"),
        WorkerSpec(launch_type="EC2", instance_type="c8g.metal-24xl"),
    ],
)
def test_specification_comes_back_from_json_as_it_was(spec: WorkerSpec) -> None:
    assert msgspec.json.decode(msgspec.json.encode(spec), type=WorkerSpec) == spec


@pytest.mark.parametrize(
    "stored", [b'{"cpu": 0}', b'{"memory": "much"}', b'{"gpu": 1}', b'{"use_spot": 1}']
)
def test_wrong_specification_is_refused_when_decoded(stored: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(stored, type=WorkerSpec)


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512MB", 512),
        ("512 MiB", 512),
        ("2GB", 2048),
        ("2GiB", 2048),
        ("2gb", 2048),
        ("0.5GB", 512),
        ("0.3GB", 308),
        ("1.5TB", 1_572_864),
        (" 8 GB ", 8192),
    ],
)
def test_memory_is_counted_as_aws_counts_it_and_rounded_up(text: str, mib: int) -> None:
    assert memory_mib(text) == mib


def test_launcher_is_opened_by_name() -> None:
    assert isinstance(open_launcher(WorkerSpec()), LocalLauncher)
    with pytest.raises(ValueError, match="no ECS cluster is configured"):
        open_launcher(WorkerSpec(launcher="ecs"))

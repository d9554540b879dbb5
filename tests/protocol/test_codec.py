"""Decoders are built at import: msgspec crashes where two threads build one at once."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import starburst_executor

PACKAGE = Path(starburst_executor.__file__).parent

PROCESSES = 100
# Each process is a fork of one that has imported nothing of the package.
_FRESH_PROCESSES = """
import faulthandler, os, sys, threading
import cloudpickle, msgspec, platformdirs  # which take the longest

faulthandler.enable()
sys.setswitchinterval(1e-6)

def decode_everything():
    from starburst_executor import config
    from starburst_executor.client import resubmit
    from starburst_executor.protocol.launching import Launching
    from starburst_executor.protocol import codec, outcome as outcomes
    from starburst_executor.protocol.manifest import (
        Heartbeat, Intervals, Lane, Limits, LiveLog, Manifest
    )
    from starburst_executor.protocol.records import Record
    from starburst_executor.protocol.tasks_object import Header
    from starburst_executor.protocol.worker_spec import WorkerSpec
    from starburst_executor.worker import ipc, pool
    values = [
        Manifest(session_id="s", python="3", package="0", created=1.0, deadline=2.0,
                 workers=1, spec=WorkerSpec(), limits=Limits(), intervals=Intervals(),
                 lanes=(Lane(client="c"),)),
        Record.fresh(3),
        Heartbeat(worker="w"),
        LiveLog(),
        Header(functions=("f",), calls=()),
        Launching(nonce="n", by="b", seconds=1.0),
        resubmit._Retries(tasks={}),
    ]
    assert {type(value) for value in values} == set(codec._decoders)
    stored = [(codec.encode(value), value) for value in values]
    outcome = outcomes.Outcome(value=b"value")
    order = ipc.JobRequest(1, "f", "d", b"", "b", ())
    reply = ipc.Reply(1, 0.0, "returned", b"", (), b"", b"")
    wrong = []
    barrier = threading.Barrier(8)

    def decode():
        barrier.wait()
        for data, value in stored:
            if codec.decode(data, type(value), "key") != value:
                wrong.append(value)
        msgspec.convert(deployment, config.Deployment)
        outcomes.decode_outcome(outcomes.encode_outcome(outcome))
        ipc.TO_CHILD.decode(ipc.ENCODER.encode(order))
        pool._from_child.decode(ipc.ENCODER.encode(reply))

    deployment = dict.fromkeys(config.Deployment.__struct_fields__, "")
    deployment |= dict(subnets=(), security_groups=(), assign_public_ip=True)
    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong

failed = 0
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os._exit(1 if decode_everything() else 0)
    failed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
print(failed, "failed")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_every_kind_can_be_decoded_for_the_first_time_by_eight_threads_at_once() -> None:
    # Without coverage: tracing threads that switch at every turn takes minutes.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    ended = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESSES, str(PROCESSES)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert ended.stdout == "0 failed\n", ended.stderr[-2000:]


# --- and nowhere later ------------------------------------------------------------

_BUILDERS = {"Decoder", "Encoder", "decodable"}


def _inside_functions(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            if getattr(node, "name", "") == "decodable":
                continue  # which decorates classes, at import
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call):
                    yield inner


def _builds_a_decoder(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name.startswith("msgspec.") and name.endswith(".decode"):
        return any(keyword.arg == "type" for keyword in call.keywords)
    return name.rpartition(".")[2] in _BUILDERS


def test_no_function_builds_a_decoder() -> None:
    late = [
        f"{file.name}:{call.lineno}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for call in _inside_functions(ast.parse(file.read_text()))
        if _builds_a_decoder(call)
    ]
    assert late == []

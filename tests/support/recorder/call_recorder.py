"""A plugin of botocore: notes which calls of AWS the package makes, here and in child processes.

botocore loads it where BOTOCORE_EXPERIMENTAL__PLUGINS names it, for every client. It needs nothing
but the standard library, so that a worker in an environment of its own can load it from this folder
alone. Calls that the tests make themselves are told from the package's by who is on the stack, and
left out. Each call is checked too: emulators take what AWS refuses.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = (
    "CALL_RECORD_FOLDER"  # variable that says where to write; each process has a file of its own
)
_PACKAGE = "starburst_executor"
_ON_BEHALF = f"{os.sep}requests.py"  # makes calls for other modules
_OF_SESSIONS = re.compile(r"(^|/)(sessions|environments)/")

# In a worker, this folder is where modules are looked for, and no package.
_constraints: Any = importlib.import_module(f"{__package__}.call_constraints".lstrip("."))

_lock = threading.Lock()
_noted: set[str] = set()


def initialize_client_plugin(client: Any) -> None:
    """Note what this client will be asked; botocore calls it."""
    client.meta.events.register("before-parameter-build", _note)


def _note(params: dict[str, Any], model: Any, **_: Any) -> None:
    folder, module = os.environ.get(FOLDER), _caller()
    if folder is None or module is None:
        return
    place = str(params.get("Key", params.get("Prefix", "")))
    call = {
        "role": "worker" if sys.argv[1:2] == ["worker"] else "client",
        "module": module,
        "service": model.service_model.signing_name,  # as IAM calls it
        "operation": model.name,
        "parameters": sorted(params),
        "of_sessions": bool(_OF_SESSIONS.search(place)),
        "faults": sorted(
            _constraints.faults(params, model.input_shape, model.service_model.service_name)
        ),
    }
    line = json.dumps(call)
    with _lock:
        if line not in _noted:
            _noted.add(line)
            with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(f"{line}\n")


def _caller() -> str | None:
    """The module of the package that makes the call, as "aws/ecs/launcher"; None: none does."""
    package = sys.modules.get(_PACKAGE)
    if package is None or package.__file__ is None:
        return None
    folder = f"{Path(package.__file__).parent}{os.sep}"
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(folder) and not file.endswith(_ON_BEHALF):
            return file.removeprefix(folder).removesuffix(".py")
        frame = frame.f_back
    return None

"""A worker's container: image and entry point."""

from __future__ import annotations

import base64
import functools
import zlib
from pathlib import Path

from starburst_executor.config import Deployment
from starburst_executor.environment import bootstrap
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["entry_point", "image"]


def image(spec: WorkerSpec, deployment: Deployment) -> str:
    """The session's own image, or else the configured one, which defaults to a stock one."""
    return spec.image or deployment.image


def entry_point(spec: WorkerSpec) -> list[str]:
    """The entry point of a worker's container; the session's URL and the worker's id follow.

    A stock image has none of our code: `bootstrap.py` travels in the task definition, some 10 KB of
    its maximum of 64.
    """
    if spec.lock is None:
        return ["python", "-P", "-m", "starburst_executor", "worker"]
    return ["python", "-I", "-c", _bootstrap(), spec.lock]


@functools.cache
def _bootstrap() -> str:
    packed = base64.b85encode(zlib.compress(Path(bootstrap.__file__).read_bytes(), 9))
    return f"import base64,zlib;exec(zlib.decompress(base64.b85decode({packed.decode()!r})))"

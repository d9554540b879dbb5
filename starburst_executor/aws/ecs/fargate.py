"""Fargate's task sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from starburst_executor.protocol.worker_spec import memory_mib

__all__ = ["Size", "fargate_size"]

# CPU units -> MiB of memory: first, last, step. From the description of RegisterTaskDefinition.
_MEMORY = {
    512: (1024, 4096, 1024),
    1024: (2048, 8192, 1024),
    2048: (4096, 16384, 1024),
    4096: (8192, 30720, 1024),
    8192: (16384, 61440, 4096),
    16384: (32768, 122880, 8192),
}
_SMALLEST = (512, 1024, 2048)  # for 256 units: the only irregular row


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A size of a task.

    Attributes:
        cpu: CPU units, of which 1,024 are a vCPU.
        memory: MiB.
    """

    cpu: int
    memory: int

    def __str__(self) -> str:
        return f'cpu={self.cpu / 1024:g}, memory="{self.memory / 1024:g}GB"'


def fargate_size(cpu: float, memory: str) -> Size:
    """The Fargate size with these vCPUs and this memory, such as "8GB".

    Raises:
        ValueError: Fargate has no such size. The message names the nearest ones.
    """
    wanted = Size(cpu=round(cpu * 1024), memory=memory_mib(memory))
    if cpu * 1024 == wanted.cpu and wanted in _sizes():
        return wanted
    near = "; ".join(str(size) for size in _nearest(wanted))
    raise ValueError(
        f"cpu={cpu:g}, memory={memory!r} is not a Fargate size; the nearest are: {near}"
    )


def _sizes() -> Iterator[Size]:
    for memory in _SMALLEST:
        yield Size(cpu=256, memory=memory)
    for cpu, (first, last, step) in _MEMORY.items():
        for memory in range(first, last + 1, step):
            yield Size(cpu=cpu, memory=memory)


def _nearest(wanted: Size) -> list[Size]:
    """The smallest sufficient size, if any, and the three most similar ones."""
    enough = [s for s in _sizes() if s.cpu >= wanted.cpu and s.memory >= wanted.memory]
    enough = sorted(enough, key=lambda s: (s.cpu, s.memory))[:1]
    near = sorted(_sizes(), key=lambda s: _difference(s, wanted))[:3]
    return enough + [size for size in near if size not in enough]


def _difference(one: Size, other: Size) -> float:
    # On a log scale, half as much is as far off as twice as much.
    cpu = math.log(one.cpu) - math.log(max(1, other.cpu))
    memory = math.log(one.memory) - math.log(other.memory)
    return abs(cpu) + abs(memory)

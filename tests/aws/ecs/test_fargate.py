"""The sizes that Fargate has."""

from __future__ import annotations

import pytest

from starburst_executor.aws.ecs.fargate import fargate_size


@pytest.mark.parametrize(
    ("cpu", "memory", "units", "mib"),
    [
        (0.25, "512MB", 256, 512),
        (0.5, "4GB", 512, 4096),
        (1, "2GB", 1024, 2048),
        (2, "16GB", 2048, 16384),
        (4, "30GB", 4096, 30720),
        (8, "60GB", 8192, 61440),
        (16, "120GB", 16384, 122880),
    ],
)
def test_a_size_of_fargate_is_taken(cpu: float, memory: str, units: int, mib: int) -> None:
    size = fargate_size(cpu, memory)
    assert (size.cpu, size.memory) == (units, mib)


@pytest.mark.parametrize(
    ("cpu", "memory", "near"),
    [
        (1, "1GB", 'cpu=1, memory="2GB"'),
        (3, "8GB", 'cpu=4, memory="8GB"'),
        (1, "2.5GB", 'cpu=1, memory="3GB"'),
        (8, "18GB", 'cpu=8, memory="20GB"'),
        (0.3, "1GB", 'cpu=0.25, memory="1GB"'),
        (32, "120GB", 'cpu=16, memory="120GB"'),
        (0.001, "1GB", 'cpu=0.25, memory="1GB"'),
    ],
)
def test_another_size_is_refused_and_the_nearest_are_named(
    cpu: float, memory: str, near: str
) -> None:
    with pytest.raises(ValueError, match="is not a Fargate size") as caught:
        fargate_size(cpu, memory)
    assert near in str(caught.value)

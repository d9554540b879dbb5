"""What a container knows of its own task."""

from __future__ import annotations

import pytest

from starburst_executor.aws.ecs.metadata import worker_id_of_task
from starburst_executor.errors import StarburstError


def test_only_an_ecs_task_has_the_id_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECS_CONTAINER_METADATA_URI_V4", raising=False)
    with pytest.raises(StarburstError, match="omit --id"):
        worker_id_of_task()

"""Fixtures for what is pickled."""

from __future__ import annotations

import pytest

from tests.support.travel import Blobs


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()

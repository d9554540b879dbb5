"""Sessions for the commands to look at."""

from __future__ import annotations

import pytest

from starburst_executor import StarburstExecutor
from tests.support.command_line import QUICK, Finished, Made


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One finished session for all tests that only read; workers really ran it."""

    def work(i: int) -> int:
        print("hello", i)  # noqa: T201  what `logs` shows
        if i and i % 3 == 0:
            raise ValueError(f"bad {i}")
        return i * i

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARBURST_HOME", str(folder / "home"))
        store = str(folder / "store")
        executor = StarburstExecutor(2, store=store, keep=True, name="squares", intervals=QUICK)
        with executor:
            for i in range(10):
                executor.submit(work, i)
    return Finished(store, executor.session_id)


@pytest.fixture
def made(directory_url: str) -> Made:
    return Made(directory_url)

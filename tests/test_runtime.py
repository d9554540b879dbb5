from __future__ import annotations

from functools import partial

import pytest

from starburst_executor.runtime import SystemRuntime


def test_gather_gives_results_in_order() -> None:
    runtime = SystemRuntime(width=4)
    try:
        assert runtime.gather([partial(pow, 2, n) for n in range(50)]) == [2**n for n in range(50)]
    finally:
        runtime.close()


def test_a_gather_within_a_gather_does_not_wait_for_threads_that_wait_for_it() -> None:
    runtime = SystemRuntime(width=2)

    def inner() -> int:
        return sum(runtime.gather([partial(int, n) for n in range(5)]))

    try:
        assert runtime.gather([inner] * 8) == [10] * 8
    finally:
        runtime.close()


def test_gather_raises_the_first_error_once_all_calls_have_ended() -> None:
    runtime = SystemRuntime(width=2)
    ended: list[int] = []
    try:
        with pytest.raises(ZeroDivisionError):
            runtime.gather([partial(divmod, 1, 0), partial(ended.append, 1)])
        assert ended == [1]
    finally:
        runtime.close()

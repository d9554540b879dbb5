"""Wrong input: the message names the value and what would be right, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from starburst_executor import (
    Intervals,
    SerializationError,
    SessionNotFound,
    StarburstExecutor,
    StoreDenied,
    StoreError,
    StoreMissing,
    StoreNotConditional,
    list_sessions,
)
from starburst_executor.client import creation
from starburst_executor.storage.base import Bytes, Store
from starburst_executor.storage.directory import DirectoryStore
from tests.support.servers import S3Server
from tests.support.sessions import keys

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_workers": 0}, ValueError, "max_workers must be 1 or more, not 0"),
    ({"max_workers": -3}, ValueError, "max_workers must be 1 or more, not -3"),
    ({"max_workers": 2.5}, TypeError, r"max_workers must be a whole number, not 2\.5"),
    ({"max_workers": "4"}, TypeError, "max_workers must be a whole number, not '4'"),
    ({"max_workers": True}, TypeError, "max_workers must be a whole number, not True"),
    ({"max_workers": 10**9}, ValueError, "max_workers=1000000000 is too large; at most 10000"),
    ({"slots": 0}, ValueError, "slots=0 is too few.*at least 1"),
    ({"slots": -1}, ValueError, "slots=-1"),
    ({"slots": "2"}, TypeError, "slots='2'.*whole number"),
    ({"cpu": 0}, ValueError, r"cpu=0.*above 0, such as 1 or 0\.5"),
    ({"cpu": -2}, ValueError, "cpu=-2"),
    ({"cpu": "four"}, TypeError, "cpu='four'.*a number of vCPUs"),
    ({"cpu": float("nan")}, ValueError, "cpu=nan"),
    ({"memory": "lots"}, ValueError, 'memory=\'lots\'.*such as "2GB"'),
    ({"memory": "8"}, ValueError, "memory='8'.*MB or GB"),
    ({"memory": "-2GB"}, ValueError, "memory='-2GB'"),
    ({"memory": "0GB"}, ValueError, "memory='0GB' is zero"),
    ({"memory": 8}, TypeError, 'memory=8.*such as "2GB"'),
    ({"launch_type": "LAMBDA"}, ValueError, "launch_type='LAMBDA'.*'FARGATE', 'EC2'"),
    ({"launch_type": "EC2"}, ValueError, "needs an instance_type.*c8a.xlarge"),
    ({"instance_type": "c8a.xlarge"}, ValueError, 'add launch_type="EC2"'),
    ({"launch_type": "EC2", "instance_type": "big"}, ValueError, "'big' is not an instance type"),
    ({"use_spot": "yes"}, TypeError, "use_spot='yes'.*True or False"),
    ({"spot_fallback": True}, ValueError, "no meaning without use_spot=True"),
    ({"use_spot": True, "spot_fallback": 1}, TypeError, "spot_fallback=1.*True or False"),
    ({"launcher": "ecs"}, ValueError, "cannot reach a directory on this machine"),
    ({"region": ""}, ValueError, "region=''.*eu-west-1"),
    ({"launcher": "kubernetes"}, ValueError, "launcher='kubernetes'.*'local', 'ecs'"),
    ({"task_timeout": 0}, ValueError, "task_timeout must be a positive number of seconds, not 0"),
    ({"task_timeout": "1m"}, TypeError, "task_timeout must be a number of seconds, not '1m'"),
    ({"task_timeout": float("inf")}, ValueError, "task_timeout.*not inf"),
    ({"idle_timeout": -1}, ValueError, "idle_timeout must be a positive.*not -1"),
    ({"idle_timeout": None}, TypeError, "idle_timeout must be a number of seconds, not None"),
    ({"session_timeout": 0}, ValueError, "session_timeout.*not 0"),
    ({"absolute_timeout": float("nan")}, ValueError, "absolute_timeout.*not nan"),
    ({"max_attempts": 0}, ValueError, "max_attempts must be 1 or more, not 0"),
    ({"use_spot": True}, ValueError,
     'use_spot=True needs launcher="ecs": .*STARBURST_LAUNCHER=ecs'),
    ({"launch_type": "FARGATE"}, ValueError, "launch_type='FARGATE' needs launcher=\"ecs\""),
    ({"launcher": "local", "launch_type": "EC2", "instance_type": "c8a.xlarge"}, ValueError,
     "launch_type='EC2', instance_type='c8a.xlarge' need launcher=\"ecs\""),
    ({"use_spot": True, "spot_fallback": True}, ValueError,
     "use_spot=True, spot_fallback=True need launcher"),
    ({"initializer": 5}, TypeError, "initializer must be callable, not 5"),
    ({"initializer": print, "initargs": 5}, TypeError, r"initargs must be a tuple.*\(1,\), not 5"),
    ({"initializer": threading.Lock().acquire}, SerializationError, "cannot pickle.*lock"),
    ({"name": 5}, TypeError, "name must be a string or None, not 5"),
    ({"modules": ["no_such_module_anywhere"]}, ModuleNotFoundError, "no_such_module_anywhere"),
    ({"intervals": 5}, TypeError, r"intervals must be Intervals\(\.\.\.\), or None, not 5"),
    ({"intervals": Intervals(lease=-1)}, ValueError,
     r"intervals\.lease must be a positive.*not -1"),
    ({"intervals": Intervals(lease=20)}, ValueError,
     r"heartbeat=20 must be at most a quarter.*lease=20"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), WRONG)
def test_a_wrong_argument_is_named_and_leaves_nothing_behind(
    directory_url: str, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(kind, match=f"(?s){text}"):
        StarburstExecutor(store=directory_url, **options)
    assert keys(directory_url) == []
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    "url",
    ["", "s3:bucket/prefix", "http://bucket/prefix", "s3://", "ftp://x", "file://host"],
)
def test_a_malformed_store_url_is_shown_with_what_would_be_right(url: str) -> None:
    if url:
        with pytest.raises(ValueError, match=r"(?s)s3://") as caught:
            StarburstExecutor(store=url)
        assert repr(url) in str(caught.value) or url in str(caught.value)
    with pytest.raises(ValueError, match="s3://"):
        list_sessions(url or "s3:")
    with pytest.raises(ValueError, match="s3://"):
        StarburstExecutor.attach("20260101-000000-abcdef", store=url or "s3:")


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match=f"'{file}' is a file; a store is "):
        StarburstExecutor(store=file)
    assert file.read_text() == "mine"


# --- sessions -----------------------------------------------------------------------


def test_an_unknown_session_is_named_with_the_store_that_was_looked_in(
    directory_url: str,
) -> None:
    with pytest.raises(SessionNotFound) as caught:
        StarburstExecutor.attach("20260101-000000-abcdef", store=directory_url)
    text = str(caught.value)
    assert "'20260101-000000-abcdef'" in text
    assert directory_url in text
    assert "another store or region" in text
    assert "list" in text
    assert keys(directory_url) == []


def test_an_unknown_session_on_s3_is_named_with_bucket_and_region(
    ministack: S3Server, s3_env: Callable[[S3Server], None]
) -> None:
    s3_env(ministack)
    url = ministack.fresh_url()
    with pytest.raises(SessionNotFound, match=url) as caught:
        StarburstExecutor.attach("20260101-000000-abcdef", store=url)
    assert "us-east-1" in str(caught.value)


@pytest.mark.parametrize("session_id", ["", "../../etc", "a/b", ".hidden", "with space"])
def test_what_cannot_be_a_session_id_is_refused(directory_url: str, session_id: str) -> None:
    with pytest.raises(ValueError, match="is not a session id, which looks like"):
        StarburstExecutor.attach(session_id, store=directory_url)


def test_a_session_id_must_be_a_text(directory_url: str) -> None:
    with pytest.raises(TypeError, match=r"session_id must be a string.*not None"):
        StarburstExecutor.attach(None, store=directory_url)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be 1 or more, not 0"),
        (
            {"max_workers": "2"},
            TypeError,
            "max_workers must be a whole number, not '2'",
        ),
        ({"launcher": "cloud"}, ValueError, "launcher='cloud'"),
        (
            {"modules": ["no_such_module_anywhere"]},
            ModuleNotFoundError,
            "no_such_module_anywhere",
        ),
    ],
)
def test_a_wrong_argument_of_attach_changes_nothing(
    directory_url: str, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with StarburstExecutor(2, store=directory_url) as one:
        with pytest.raises(kind, match=text):
            StarburstExecutor.attach(one.session_id, store=directory_url, **options)
        assert one.status().workers_wanted == 2


def test_scale_refuses_what_is_no_number_of_workers(directory_url: str) -> None:
    with StarburstExecutor(2, store=directory_url) as one:
        for wrong, kind in (
            (0, ValueError),
            (-1, ValueError),
            (10**6, ValueError),
            ("3", TypeError),
        ):
            with pytest.raises(kind, match=str(wrong)):
                one.scale(wrong)  # type: ignore[arg-type]
        assert one.status().workers_wanted == 2


# --- stores that cannot be used -----------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named(
    ministack: S3Server, s3_env: Callable[[S3Server], None]
) -> None:
    s3_env(ministack)
    with pytest.raises(StoreMissing, match="no-such-bucket-here"):
        StarburstExecutor(store="s3://no-such-bucket-here/some")


def test_missing_credentials_are_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(StoreDenied, match=r"(?i)credentials"):
        StarburstExecutor(store="s3://some-bucket/some")


def test_wrong_credentials_are_refused_with_the_permission_that_was_wanted(
    seaweedfs: S3Server,
    s3_env: Callable[[S3Server], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_env(seaweedfs)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreDenied, match=r"(?s)shared"):
        StarburstExecutor(store=seaweedfs.fresh_url())


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="could not write /proc/no-such-store"):
        StarburstExecutor(store="/proc/no-such-store")


class Forgetful(DirectoryStore):
    """A store that ignores conditions, as some servers do."""

    def replace(self, key: str, data: Bytes, version: str) -> str:
        self.put(key, data)
        return "1"


def test_a_store_that_ignores_conditions_is_refused(
    directory_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_forgetful(url: str | Path) -> Store:
        return Forgetful(url)

    monkeypatch.setattr(creation, "open_store", open_forgetful)
    with pytest.raises(StoreNotConditional, match=f"(?s){directory_url}.*Use Amazon S3"):
        StarburstExecutor(store=directory_url)
    assert keys(directory_url) == []


def test_a_size_for_ecs_is_said_to_limit_nothing_on_this_machine(
    directory_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with StarburstExecutor(1, store=directory_url, cpu=4, memory="8GB"):
        assert "cpu=4, memory='8GB' have no effect on this machine" in caplog.text
    caplog.clear()
    with StarburstExecutor(1, store=directory_url):
        assert caplog.text == ""

"""boto3 clients with this package's timeouts and retries; their requests are counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starburst_executor.errors import ConfigError

if TYPE_CHECKING:
    import botocore.session
    from botocore.loaders import Loader

__all__ = ["make_client", "requests"]

requests: Counter[str] = Counter()
"""This process's requests so far by operation name, including retries: S3 bills each."""

# Four tries of at most 35 s, with back-off up to 20 s: callers get "unavailable" within minutes,
# and a dropped reply costs a claim some seconds, not its lease.
_TRIES = 4
_CONNECT_TIMEOUT = 5  # seconds
_READ_TIMEOUT = 30  # seconds without a byte
_ENDPOINT = "AWS_ENDPOINT_URL"
_CHECKED_VARIABLES = (
    _ENDPOINT,
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
_URL = re.compile(r"https?://[^/\s]\S*")
_CONNECTIONS = 32  # more threads than that would wait for one another


def make_client(service: str, *, region: str | None = None, tries: int = _TRIES) -> Any:
    """Create a boto3 client with this package's timeouts, retries and user agent.

    Credentials, endpoint and, unless given, region come from the usual AWS settings.
    The first client of a process takes 0.1 to 0.3 seconds. Threads may share clients.

    Args:
        service: boto3's name for the service, such as `s3`.
        region: Name of the AWS region.
        tries: How often to try a request; 1 if the caller itself retries.

    Raises:
        ConfigError: a variable or boto3's configuration file has a value that cannot be used.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    _check_variables()
    # A session per client: creating clients from one session is not thread-safe.
    core = botocore.session.get_session()
    loader = _loader(core.get_config_variable("data_path"))
    core.register_component("data_loader", loader)
    _parse_timestamps_fast(core)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": tries},
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_READ_TIMEOUT,
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        user_agent_extra=f"starburst_executor/{version('starburst-executor')}",
        # Requests are signed with their content's hash anyway, and not all servers other than
        # AWS know the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.Session(botocore_session=core, region_name=region)
    make: Any = session.client
    try:
        client = make(service, config=config)
    except ValueError as error:
        raise ConfigError(f"the AWS settings for {service} cannot be used: {error}") from error
    client.meta.events.register("before-send", _count)
    return client


def _check_variables() -> None:
    """Refuse values that boto3 sends as they are, or rejects without naming the variable."""
    for name, value in os.environ.items():
        if not name.startswith(_CHECKED_VARIABLES):
            continue
        if value != value.strip():
            raise ConfigError(f"the value of {name} begins or ends with a blank or a line break")
        if name.startswith(_ENDPOINT) and value and not _URL.fullmatch(value):
            raise ConfigError(
                f"{name}={value!r} is not an endpoint; expected something like "
                "https://s3.example.com or http://localhost:9000"
            )


def _count(event_name: str, **_: Any) -> None:
    requests[event_name.rpartition(".")[2]] += 1


@cache
def _loader(search_path: str | None) -> Loader:
    """The loader of boto3's service descriptions; shared, as loading dominates client creation."""
    from botocore.loaders import create_loader

    loader: Loader = create_loader(search_path)
    return loader


def _parse_timestamps_fast(core: botocore.session.Session) -> None:
    """Parse times with the standard library: dateutil takes most of a listing's time."""
    from botocore.utils import parse_timestamp

    def parse(value: Any) -> datetime:
        if isinstance(value, str) and value.endswith("Z"):
            return datetime.fromisoformat(value)
        if isinstance(value, str) and value.endswith(" GMT"):
            return parsedate_to_datetime(value)
        parsed: datetime = parse_timestamp(value)
        return parsed

    factory = core.get_component("response_parser_factory")
    factory.set_parser_defaults(timestamp_parser=parse)

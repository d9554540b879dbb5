"""Settings: arguments, then `STARBURST_*` variables, then the configuration file, then defaults.

    argument         store="s3://bucket/runs"             the call, or a command's option
    environment      STARBURST_STORE=s3://bucket/runs     lists: subnet-1,subnet-2
    file             [default]                            TOML, a section per profile; see `setup`
                     store = "s3://bucket/runs"
    built in         a directory in the user's data folder, workers on this machine

Settings are resolved independently, and each knows where it came from. The file is `config.toml` in
the user's configuration folder; the profile is `STARBURST_PROFILE`, or "default". AWS credentials
do not belong here: they come from the AWS settings. Blanks and line breaks around a value, as files
and secrets often have, do not count.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from starburst_executor.errors import ConfigError

__all__ = [
    "DEFAULT_PROFILE",
    "Configuration",
    "Deployment",
    "Settings",
    "config_file",
    "data_home",
    "default_image",
    "load",
    "load_deployment",
    "profile_name",
    "profile_values",
    "remove_profile",
    "write_profile",
]

DEFAULT_PROFILE = "default"

_PREFIX = "STARBURST_"
_BUILT_IN = "built in"
_PROFILE = re.compile(r"[A-Za-z0-9_-]+")
_SECTION = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting, with its default.

    Attributes:
        store: Where sessions are kept: `s3://bucket/prefix` or a directory.
        launcher: What starts workers: "local" or "ecs".
        region: AWS region of the deployment; if unset, that of your AWS settings.
        cluster: Name or ARN of the ECS cluster; unset if there is none.
        subnets: Ids of the subnets that workers are started in.
        security_groups: Ids of the security groups of workers.
        assign_public_ip: Whether workers get a public address. Without one, the subnets need a NAT
            gateway or VPC endpoints.
        execution_role_arn: The role that ECS uses to pull the image and write logs.
        task_role_arn: The role that workers and tasks run under.
        instance_profile_arn: The role, as an instance profile, of EC2 instances that workers run
            on.
        log_group: CloudWatch log group of the workers.
        image: Container image of the workers; if unset, the stock one for this Python minor
            version.
        stack: Name of the CloudFormation stack that `setup` created; unset if there is none.
        max_hourly_cost: Dollars per hour that a session's workers may cost; 0 means no limit.
    """

    store: str = ""
    launcher: str = "local"
    region: str = ""
    cluster: str = ""
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    assign_public_ip: bool = True
    execution_role_arn: str = ""
    task_role_arn: str = ""
    instance_profile_arn: str = ""
    log_group: str = ""
    image: str = ""
    stack: str = ""
    max_hourly_cost: float = 0.0


_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """The AWS resources that workers use; see `Settings` for each."""

    region: str
    store: str
    cluster: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]
    assign_public_ip: bool
    execution_role_arn: str
    task_role_arn: str
    log_group: str
    image: str
    instance_profile_arn: str = ""


# msgspec inspects a class on first use, and crashes if two threads do so at once: do it on import.
msgspec.json.Decoder(Deployment)


_NEEDED = (
    "store",
    "region",
    "subnets",
    "security_groups",
    "execution_role_arn",
    "task_role_arn",
    "log_group",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The settings in force.

    Attributes:
        profile: The section of the file that was read.
        settings: Their values.
        sources: Name of each setting -> where its value came from, for people.
    """

    profile: str
    settings: Settings
    sources: Mapping[str, str]


def data_home() -> Path:
    """The folder for this user's data on this machine: `STARBURST_HOME` or the platform default."""
    named = os.environ.get("STARBURST_HOME", "").strip()
    if named:
        return Path(named).expanduser().absolute()
    return platformdirs.user_data_path("starburst_executor")


def config_file() -> Path:
    """Path of the configuration file, whether or not it exists."""
    return platformdirs.user_config_path("starburst_executor") / "config.toml"


def profile_name(given: str | None = None) -> str:
    """The profile to use: the one given, or `STARBURST_PROFILE`, or "default".

    Raises:
        ConfigError: it is not a valid profile name.
    """
    name = (given or os.environ.get("STARBURST_PROFILE", "")).strip() or DEFAULT_PROFILE
    if not _PROFILE.fullmatch(name):
        raise ConfigError(f"{name!r} is not a valid profile name; use letters, digits, - and _")
    return name


def profile_values(profile: str) -> dict[str, Any]:
    """The profile's section of the file, unchecked; empty if the file has no such profile.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _section(profile, required=False)


def load(profile: str | None = None, arguments: Mapping[str, Any] | None = None) -> Configuration:
    """The settings in force, each with its source.

    Args:
        profile: Section of the file; defaults to `profile_name()`.
        arguments: Arguments of the call, by setting; None means not given.

    Raises:
        ConfigError: a value or the file is invalid, or the requested profile does not exist.
    """
    name = profile_name(profile)
    required = bool(profile or os.environ.get("STARBURST_PROFILE", "").strip())
    layers: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("argument", arguments or {}),
        ("{variable}", _from_environment()),
        (f"{config_file()} [{name}]", _section(name, required=required)),
        (_BUILT_IN, _built_in()),
    )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for where, layer in layers:
        for setting, value in layer.items():
            source = where.replace("{variable}", f"{_PREFIX}{setting.upper()}")
            if value is not None and setting not in values:
                values[setting] = _checked(setting, value, source)
                sources[setting] = source
    settings = Settings(**values)
    return Configuration(profile=name, settings=settings, sources={s: sources[s] for s in _FIELDS})


def load_deployment(profile: str | None = None) -> Deployment | None:
    """The AWS resources that workers use; None if no cluster is configured.

    Raises:
        ConfigError: a cluster is configured, but something it needs is not.
    """
    found = load(profile)
    settings = found.settings
    if not settings.cluster:
        return None
    values = msgspec.structs.asdict(settings)
    values["image"] = settings.image or default_image()
    values["region"] = settings.region or _aws_region()
    missing = [name for name in _NEEDED if not values[name]]
    if missing:
        variables = ", ".join(f"{_PREFIX}{name.upper()}" for name in missing)
        raise ConfigError(
            f"the cluster {settings.cluster!r} is set (by {found.sources['cluster']}), but "
            f"{', '.join(missing)} not. Run `starburst-executor setup`, which creates and records "
            f"what is missing, or set {variables}, or add them to [{found.profile}] of "
            f"{config_file()}."
        )
    return Deployment(**{name: values[name] for name in Deployment.__struct_fields__})


def default_image() -> str:
    """The stock image for this Python minor version, from a registry that needs no account."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"public.ecr.aws/docker/library/python:{minor}-slim"


def write_profile(profile: str, values: Mapping[str, Any]) -> Path:
    """Replace a profile in the file; other profiles and comments stay as they are.

    Args:
        profile: Its name.
        values: Settings by name. The profile will contain only these.

    Returns:
        The file.

    Raises:
        ConfigError: a value is invalid, or the file cannot be read or written.
    """
    lines = [f"[{profile_name(profile)}]"]
    for name, value in values.items():
        lines.append(f"{name} = {_toml(_checked(name, value, 'write_profile'))}")
    return _change_section(profile, [*lines, ""])


def remove_profile(profile: str) -> Path:
    """Remove a profile from the file, if it is there; return the file.

    Raises:
        ConfigError: the file cannot be read or written.
    """
    return _change_section(profile, [])


# --- layers --------------------------------------------------------------------------


def _from_environment() -> dict[str, str]:
    """Values from `STARBURST_*` variables; empty and blank variables do not count."""
    named = {setting: os.environ.get(_PREFIX + setting.upper(), "") for setting in _FIELDS}
    return {setting: value for setting, value in named.items() if value.strip()}


def _section(profile: str, *, required: bool) -> dict[str, Any]:
    sections = _sections(_file_text())
    if profile in sections:
        return sections[profile]
    if required:
        existing = ", ".join(sorted(sections)) or "none"
        raise ConfigError(
            f"there is no profile {profile!r} in {config_file()}; it has: {existing}. "
            f"`starburst-executor setup --profile {profile}` creates it."
        )
    return {}


def _built_in() -> dict[str, Any]:
    values = {name: field.default for name, field in _FIELDS.items()}
    return {**values, "store": str(data_home() / "store")}


def _aws_region() -> str:
    # Only the two variables: reading the AWS configuration file takes boto3, which is slow to
    # import.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


# --- values --------------------------------------------------------------------------


def _checked(setting: str, value: Any, source: str) -> Any:
    field = _FIELDS.get(setting)
    if field is None:
        near = difflib.get_close_matches(setting, _FIELDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_FIELDS)}"
        raise ConfigError(f"there is no setting {setting!r} ({source}){hint}")
    try:
        return msgspec.convert(_parts(field.type, value), field.type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{setting}={value!r} (from {source}) is invalid: {error}. "
            f"It must be {_form(field.type)}."
        ) from error


def _parts(kind: Any, value: Any) -> Any:
    """Strip blanks and line breaks, and split a list as variables write it."""
    if isinstance(value, list | tuple):
        return [part.strip() if isinstance(part, str) else part for part in value]
    if not isinstance(value, str):
        return value
    if kind is str or kind is bool or kind is float:
        return value.strip()
    return [part.strip() for part in value.split(",") if part.strip()]


def _form(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    if kind is float:
        return "a number"
    return "a string" if kind is str else "a list of strings, comma-separated in a variable"


def _toml(value: Any) -> str:
    # JSON strings, lists and booleans are valid TOML, unless something is escaped as a surrogate
    # pair.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


# --- the file ------------------------------------------------------------------------


def _file_text() -> str:
    try:
        return config_file().read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config_file()} cannot be read: {error}") from error


def _sections(text: str) -> dict[str, dict[str, Any]]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config_file()} is not TOML: {error}") from error
    for name, section in document.items():
        if not isinstance(section, dict):
            raise ConfigError(
                f"{config_file()} has {name!r} outside any profile; "
                "put a line such as [default] above it"
            )
    return document


def _change_section(profile: str, lines: list[str]) -> Path:
    file = config_file()
    text = _file_text()
    expected = {name: s for name, s in _sections(text).items() if name != profile}
    changed = _with_section(text, profile, lines)
    if not _holds(changed, expected, profile):
        raise ConfigError(
            f"the layout of {file} does not allow replacing [{profile}] without touching other "
            f"profiles; edit it by hand so that [{profile}] reads:\n" + "\n".join(lines)
        )
    try:
        _replace_file(file, changed)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    return file


def _holds(text: str, expected: Mapping[str, Any], profile: str) -> bool:
    """Whether the profiles other than `profile` are exactly as expected."""
    try:
        sections = _sections(text)
    except ConfigError:
        return False
    return {n: s for n, s in sections.items() if n != profile} == expected


def _with_section(text: str, profile: str, lines: list[str]) -> str:
    """`text` with the lines of one section replaced, or added at the end."""
    before: list[str] = []
    after: list[str] = []
    comments: list[str] = []  # at the section's end they may belong to the next one
    inside, found = False, False
    for line in text.splitlines():
        heading = _SECTION.fullmatch(line)
        if heading:
            inside = heading[1].strip("\"'") == profile
            found = found or inside
            after += comments
            comments.clear()
        if not inside:
            (after if found else before).append(line)
        elif line.startswith("#"):
            comments.append(line)
        else:
            comments.clear()
    if lines and before and not found and before[-1].strip():
        before.append("")
    return "".join(f"{line}\n" for line in (*before, *lines, *after))


def _replace_file(file: Path, text: str) -> None:
    """Replace a file atomically: readers see the old or the new content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    target = file.resolve()  # a symlink into dotfiles stays a link
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, delete=False
    ) as temporary:
        temporary.write(text)
    Path(temporary.name).replace(target)

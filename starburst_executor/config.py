"""Settings: arguments, then `STARBURST_*` variables, then the configuration file, then what is built in.

    argument         store="s3://bucket/runs"             the call, or a command's option
    environment      STARBURST_STORE=s3://bucket/runs     lists with commas: STARBURST_SUBNETS=subnet-1,subnet-2
    file             [default]                            TOML, a section for each profile; `setup` writes it
                     store = "s3://bucket/runs"
    built in         a directory of this user's, workers on this machine

Each setting is looked up by itself, and each knows where it came from. The file is `config.toml` in the
user's configuration folder; the profile is `STARBURST_PROFILE`, else "default". AWS credentials are no
concern of this file: they come from the AWS settings.
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
    """Every setting, with what is used if nobody says anything.

    Attributes:
        store: Where sessions are kept: `s3://bucket/prefix` or a directory.
        launcher: What starts workers: "local" or "ecs".
        region: AWS region of the deployment; "" for that of the AWS settings.
        cluster: Name or ARN of the ECS cluster; "" if there is none.
        subnets: Ids of the subnets that workers are started in.
        security_groups: Ids of the security groups of workers.
        assign_public_ip: Whether workers get a public address; without, the subnets need a NAT gateway
            or VPC endpoints.
        execution_role_arn: The role by which ECS pulls the image and writes logs.
        task_role_arn: The role that workers and tasks have.
        instance_profile_arn: The role, as an instance profile, of EC2 instances that workers run on.
        log_group: CloudWatch log group of the workers.
        image: Container image of the workers; "" for the stock one of this Python minor version.
        stack: Name of the CloudFormation stack that `setup` made; "" if none.
        max_hourly_cost: Dollars an hour that the workers of a session may cost; 0 for no limit.
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
    """What of an AWS account the workers use; see `Settings` for each."""

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


# msgspec reads a class when it first decodes or converts to it, and crashes if two threads do so at once.
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
    """The folder for this user's data on this machine: `STARBURST_HOME`, or the platform's own place."""
    named = os.environ.get("STARBURST_HOME")
    if named:
        return Path(named).expanduser().absolute()
    return platformdirs.user_data_path("starburst_executor")


def config_file() -> Path:
    """Where the configuration file is, or would be."""
    return platformdirs.user_config_path("starburst_executor") / "config.toml"


def profile_name(given: str | None = None) -> str:
    """The profile to use: the one given, else `STARBURST_PROFILE`, else "default".

    Raises:
        ConfigError: it cannot be the name of a profile.
    """
    name = given or os.environ.get("STARBURST_PROFILE") or DEFAULT_PROFILE
    if not _PROFILE.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be the name of a profile; use letters, digits, - and _")
    return name


def profile_values(profile: str) -> dict[str, Any]:
    """What the file says under a profile, unchecked; nothing if it has no such profile.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _section(profile, asked=False)


def load(profile: str | None = None, arguments: Mapping[str, Any] | None = None) -> Configuration:
    """The settings in force, each with its source.

    Args:
        profile: Section of the file; default `profile_name()`.
        arguments: What was said in the call, by name of the setting; None is nothing said.

    Raises:
        ConfigError: a value or the file is wrong, or the profile that was asked for is not there.
    """
    name = profile_name(profile)
    asked = bool(profile or os.environ.get("STARBURST_PROFILE"))
    layers: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("argument", arguments or {}),
        ("{variable}", _from_environment()),
        (f"{config_file()} [{name}]", _section(name, asked=asked)),
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
    """What of an AWS account the workers use; None if no cluster is configured.

    Raises:
        ConfigError: a cluster is configured, and something that goes with it is not.
    """
    found = load(profile)
    settings = found.settings
    if not settings.cluster:
        return None
    values = msgspec.structs.asdict(settings)
    values["image"] = settings.image or default_image()
    values["region"] = settings.region or _aws_region()
    lacking = [name for name in _NEEDED if not values[name]]
    if lacking:
        variables = ", ".join(f"{_PREFIX}{name.upper()}" for name in lacking)
        raise ConfigError(
            f"the cluster {settings.cluster!r} is set (by {found.sources['cluster']}) but {', '.join(lacking)} "
            f"not. Run `starburst-executor setup`, which makes and notes what is lacking, or set {variables}, "
            f"or write them into [{found.profile}] of {config_file()}."
        )
    return Deployment(**{name: values[name] for name in Deployment.__struct_fields__})


def default_image() -> str:
    """The stock image of this Python minor version, from a registry that needs no account."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"public.ecr.aws/docker/library/python:{minor}-slim"


def write_profile(profile: str, values: Mapping[str, Any]) -> Path:
    """Write a profile into the file, whole; other profiles and comments stay as they are.

    Args:
        profile: Its name.
        values: Settings by name. What is not among them is not set by the file afterwards.

    Returns:
        The file.

    Raises:
        ConfigError: a value is wrong, or the file cannot be read or written.
    """
    lines = [f"[{profile_name(profile)}]"]
    for name, value in values.items():
        lines.append(f"{name} = {_toml(_checked(name, value, 'write_profile'))}")
    return _change_section(profile, [*lines, ""])


def remove_profile(profile: str) -> Path:
    """Take a profile out of the file; returns the file. One that is not there is no error.

    Raises:
        ConfigError: the file cannot be read or written.
    """
    return _change_section(profile, [])


# --- layers --------------------------------------------------------------------------


def _from_environment() -> dict[str, str]:
    """What `STARBURST_*` variables say; an empty variable says nothing."""
    named = {setting: os.environ.get(_PREFIX + setting.upper()) for setting in _FIELDS}
    return {setting: value for setting, value in named.items() if value}


def _section(profile: str, *, asked: bool) -> dict[str, Any]:
    sections = _sections(_file_text())
    if profile in sections:
        return sections[profile]
    if asked:
        there = ", ".join(sorted(sections)) or "none"
        raise ConfigError(
            f"there is no profile {profile!r} in {config_file()}; there is: {there}. "
            f"`starburst-executor setup --profile {profile}` makes it."
        )
    return {}


def _built_in() -> dict[str, Any]:
    values = {name: field.default for name, field in _FIELDS.items()}
    return {**values, "store": str(data_home() / "store")}


def _aws_region() -> str:
    # Only the two variables: the AWS configuration file is read by boto3 alone, which takes long to import.
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


# --- values --------------------------------------------------------------------------


def _checked(setting: str, value: Any, source: str) -> Any:
    field = _FIELDS.get(setting)
    if field is None:
        near = difflib.get_close_matches(setting, _FIELDS, 1)
        hint = f"; {near[0]!r} perhaps" if near else f"; known: {', '.join(_FIELDS)}"
        raise ConfigError(f"there is no setting {setting!r} ({source}){hint}")
    try:
        return msgspec.convert(_parts(field.type, value), field.type, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{setting}={value!r} (from {source}) is wrong: {error}. It must be {_form(field.type)}."
        ) from error


def _parts(kind: Any, value: Any) -> Any:
    """A list as variables write it, split; anything else as it is."""
    if kind is str or kind is bool or kind is float or not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _form(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    if kind is float:
        return "a number"
    return "a text" if kind is str else "a list of texts, in a variable with commas"


def _toml(value: Any) -> str:
    # JSON's texts, lists and booleans are TOML's too, unless something is escaped as a surrogate pair.
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
                f"{config_file()} has {name!r} outside of a profile; put a line such as [default] above it"
            )
    return document


def _change_section(profile: str, lines: list[str]) -> Path:
    file = config_file()
    text = _file_text()
    expected = {name: s for name, s in _sections(text).items() if name != profile}
    changed = _with_section(text, profile, lines)
    if not _holds(changed, expected, profile):
        raise ConfigError(
            f"{file} is laid out in a way that [{profile}] cannot be replaced without touching other profiles; "
            f"edit it by hand, so that [{profile}] reads:\n" + "\n".join(lines)
        )
    try:
        _replace_file(file, changed)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    return file


def _holds(text: str, expected: Mapping[str, Any], profile: str) -> bool:
    """Whether the profiles besides `profile` are just as expected."""
    try:
        sections = _sections(text)
    except ConfigError:
        return False
    return {n: s for n, s in sections.items() if n != profile} == expected


def _with_section(text: str, profile: str, lines: list[str]) -> str:
    """`text` with the lines of one section replaced, or added at the end."""
    before: list[str] = []
    after: list[str] = []
    comments: list[str] = []  # in the section: perhaps those of the one that follows
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
    """Write a file so that whoever reads meanwhile finds the old or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    target = file.resolve()  # a link into somebody's dotfiles stays a link
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, delete=False
    ) as temporary:
        temporary.write(text)
    Path(temporary.name).replace(target)

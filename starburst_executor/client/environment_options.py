"""Where a session's workers get their packages: checks the arguments and applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from starburst_executor import config
from starburst_executor.environment.capture import Prepared, Wishes, prepare
from starburst_executor.protocol.worker_spec import WorkerSpec

__all__ = ["choose_environment", "on_launcher", "prepare_environment"]

_KINDS = ("sync", "image", "none")


def choose_environment(
    spec: WorkerSpec,
    environment: str | None,
    image: str | None,
    requirements: str | Path | Iterable[str] | None,
    packages: Iterable[str],
    exclude: Iterable[str],
) -> tuple[WorkerSpec, Wishes]:
    """The specification with its environment, and the options for capturing one.

    Raises:
        TypeError, ValueError: an argument is wrong, or conflicts with another.
    """
    ecs = spec.launcher == "ecs"
    if image is not None and (not isinstance(image, str) or not image.strip()):
        raise TypeError(
            "image must be the name of a container image, such as 'registry.example/analysis:3', "
            f"not {image!r}"
        )
    if image and not ecs:
        raise ValueError(
            f'image={image!r} needs launcher="ecs": workers on this machine are not containers. '
            'Leave it out, or use environment="sync" to give workers their own packages'
        )
    if ecs:
        given, image = image is not None, image or config.load().settings.image or None
        environment = environment or ("image" if image else "sync")
    else:
        given, environment = False, environment or "none"
    _check_kind(environment, image, given=given, ecs=ecs)
    wishes = _wishes(requirements, packages, exclude)
    if environment != "sync" and wishes != Wishes():
        raise ValueError(
            f"environment={environment!r} installs nothing, so requirements, packages and exclude "
            'have no effect; add environment="sync", or leave them out'
        )
    return replace(spec, environment=cast(Any, environment), image=image), wishes


def prepare_environment(
    spec: WorkerSpec, wishes: Wishes, platform: Callable[[], str]
) -> tuple[WorkerSpec, Prepared | None]:
    """Capture the environment to install on workers, if any; its lock goes into the specification.

    Args:
        spec: The specification.
        wishes: What to install.
        platform: Returns the platform that the workers run on.

    Raises:
        PackageError: a package cannot be installed on the workers.
    """
    if spec.environment != "sync":
        return spec, None
    prepared = prepare(wishes, platform=platform())
    return replace(spec, lock=prepared.digest), prepared


def on_launcher(spec: WorkerSpec, launcher: str) -> WorkerSpec:
    """The specification with another launcher; a local one uses this environment, not an image."""
    spec = replace(spec, launcher=cast(Any, launcher))
    if launcher == "local" and spec.environment == "image":
        return replace(spec, environment="none", image=None)
    return spec


def _check_kind(environment: str, image: str | None, *, given: bool, ecs: bool) -> None:
    if environment not in _KINDS:
        raise ValueError(
            f"environment={environment!r} is unknown; "
            f"it must be one of {', '.join(map(repr, _KINDS))}"
        )
    if environment == "image" and not ecs:
        raise ValueError(
            'environment="image" needs launcher="ecs": workers on this machine are not containers. '
            'Use environment="sync" to give workers their own packages, or leave it out to use '
            "the packages installed here"
        )
    if environment == "image" and not image:
        raise ValueError(
            'environment="image" needs image=, or a configured image '
            "(`starburst-executor setup --image URI`)"
        )
    if environment == "none" and given:
        raise ValueError(
            f'environment="none" uses the configured image; with image={image!r} use '
            'environment="image", or "sync" to install this machine\'s packages on top of it'
        )


def _wishes(
    requirements: str | Path | Iterable[str] | None,
    packages: Iterable[str],
    exclude: Iterable[str],
) -> Wishes:
    return Wishes(
        requirements=None if requirements is None else _requirement_lines(requirements),
        packages=_texts("packages", packages),
        exclude=_texts("exclude", exclude),
    )


def _requirement_lines(requirements: str | Path | Iterable[str]) -> tuple[str, ...]:
    if not isinstance(requirements, str | Path):
        return _texts("requirements", requirements)
    file = Path(requirements).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot read the requirements file requirements={str(requirements)!r}: {error}. "
            "To give the requirements themselves, pass a list, such as ['numpy==2.1.0']"
        ) from error
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    wanted = tuple(line for line in lines if line and not line.startswith("#"))
    options = [line for line in wanted if line.startswith("-")]
    if options:
        raise ValueError(
            f"{file} contains {options[0]!r}: options are not supported there. List only "
            "requirements, and configure indexes where pip or uv read them "
            "(PIP_INDEX_URL, pip.conf, uv.toml)"
        )
    return wanted


def _texts(name: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"{name}={values!r} must be a list of strings, such as [{values!r}]")
    found = tuple(values)
    for value in found:
        if not isinstance(value, str):
            raise TypeError(f"{name} must contain strings, such as 'numpy==2.1.0', not {value!r}")
    return found

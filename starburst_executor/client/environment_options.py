"""Where a session's workers get their packages: the arguments about it, checked, and what follows from them."""

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
    """The specification with its environment, and what is wished of one that is captured.

    Raises:
        TypeError, ValueError: an argument is wrong, or has no meaning beside another.
    """
    ecs = spec.launcher == "ecs"
    if image is not None and (not isinstance(image, str) or not image.strip()):
        raise TypeError(
            f"image must be the name of a container image, such as 'registry.example/analysis:3', not {image!r}"
        )
    if image and not ecs:
        raise ValueError(
            f'image={image!r} needs launcher="ecs": workers on this machine are no containers. Leave it out, or say '
            'environment="sync" for workers with packages of their own'
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
            "requirements, packages and exclude say what is installed for the workers, and nothing is with "
            f'environment={environment!r}; add environment="sync", or leave them out'
        )
    return replace(spec, environment=cast(Any, environment), image=image), wishes


def prepare_environment(
    spec: WorkerSpec, wishes: Wishes, platform: Callable[[], str]
) -> tuple[WorkerSpec, Prepared | None]:
    """Capture what the workers shall have, if they are to have it installed; the lock goes into the specification.

    Args:
        spec: The specification.
        wishes: What is wished of it.
        platform: Says what binaries must be built for where the workers run.

    Raises:
        PackageError: something cannot be brought to them.
    """
    if spec.environment != "sync":
        return spec, None
    prepared = prepare(wishes, platform=platform())
    return replace(spec, lock=prepared.digest), prepared


def on_launcher(spec: WorkerSpec, launcher: str) -> WorkerSpec:
    """The specification with another launcher; one on this machine has no images, and runs what is here."""
    spec = replace(spec, launcher=cast(Any, launcher))
    if launcher == "local" and spec.environment == "image":
        return replace(spec, environment="none", image=None)
    return spec


def _check_kind(environment: str, image: str | None, *, given: bool, ecs: bool) -> None:
    if environment not in _KINDS:
        raise ValueError(
            f"environment={environment!r} is unknown; it must be one of {', '.join(map(repr, _KINDS))}"
        )
    if environment == "image" and not ecs:
        raise ValueError(
            'environment="image" needs launcher="ecs": workers on this machine are no containers. Say '
            'environment="sync" for workers with packages of their own, or leave it out for those that are here'
        )
    if environment == "image" and not image:
        raise ValueError(
            'environment="image" needs an image=, or one that is configured (`starburst-executor setup --image URI`)'
        )
    if environment == "none" and given:
        raise ValueError(
            f'environment="none" takes the configured image; with image={image!r} say environment="image", or "sync" '
            "to have the packages of this machine installed on top of it"
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
            f"requirements={str(requirements)!r} is the path of a requirements file and cannot be read: {error}. "
            "For requirements themselves write a list, such as ['numpy==2.1.0']"
        ) from error
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    wanted = tuple(line for line in lines if line and not line.startswith("#"))
    options = [line for line in wanted if line.startswith("-")]
    if options:
        raise ValueError(
            f"{file} holds {options[0]!r}: options are not read from it. Write requirements alone, and name indexes "
            "where pip or uv read them (PIP_INDEX_URL, pip.conf, uv.toml)"
        )
    return wanted


def _texts(name: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"{name}={values!r} must be a list of texts, such as [{values!r}]")
    found = tuple(values)
    for value in found:
        if not isinstance(value, str):
            raise TypeError(f"{name} must hold texts, such as 'numpy==2.1.0', not {value!r}")
    return found

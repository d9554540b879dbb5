"""What is captured of the caller's packages, what is refused, and what lies in the store of it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from starburst_executor import StarburstExecutor
from starburst_executor.client.environment_options import choose_environment, on_launcher
from starburst_executor.environment import bootstrap, capture, indexes
from starburst_executor.environment.capture import Prepared, Wishes, prepare
from starburst_executor.environment.indexes import Indexes
from starburst_executor.environment.installed import Package, installed, normalized
from starburst_executor.environment.lock import Lock
from starburst_executor.environment.repository import pack, prune, ship
from starburst_executor.environment.wheels import build
from starburst_executor.errors import PackageError
from starburst_executor.protocol.worker_spec import WorkerSpec
from starburst_executor.storage.url import open_store
from tests.support.callers import make_project
from tests.support.sessions import keys

LOCAL, ECS = WorkerSpec(), WorkerSpec(launcher="ecs")
HERE = bootstrap.here()
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
FOREIGN = "linux-aarch64" if HERE != "linux-aarch64" else "linux-x86_64"


def distribution(
    site: Path,
    name: str,
    version: str,
    *,
    origin: object = None,
    requires: Iterable[str] = (),
) -> None:
    """Metadata as an installer leaves it."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    )
    (info / "INSTALLER").write_text("pip\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))


# --- what is installed, and whence ------------------------------------------------------


def test_each_kind_of_origin_is_found(tmp_path: Path) -> None:
    site = tmp_path / "site"
    distribution(site, "From_Index", "1.0")
    distribution(
        site, "from-git", "2.0",
        origin={"url": "https://me:secret@host.test/r.git", "subdirectory": "a/b",
                "vcs_info": {"vcs": "git", "commit_id": "abc123"}},
    )  # fmt: skip
    checkout = {"url": (tmp_path / "my pkg").as_uri(), "dir_info": {"editable": True}}
    distribution(site, "checkout", "3.0", origin=checkout)
    away = {"url": "https://host.test/away-4.0.tar.gz", "archive_info": {}}
    distribution(site, "away", "4.0", origin=away)
    found = {p.name: (p.line, p.source) for p in installed([str(site)])}
    assert found == {
        "from-index": ("from-index==1.0", None),
        "from-git": ("from-git @ git+https://host.test/r.git@abc123#subdirectory=a/b", None),
        "checkout": (None, tmp_path / "my pkg"),
        "away": ("away @ https://host.test/away-4.0.tar.gz", None),
    }  # fmt: skip


def test_the_first_of_a_name_counts_and_checkouts_on_the_path_are_built(
    tmp_path: Path,
) -> None:
    checkout = make_project(tmp_path / "checkout", "mine", {"__init__.py": ""})
    (checkout / "mine.egg-info").mkdir()
    (checkout / "mine.egg-info" / "PKG-INFO").write_text("Name: mine\nVersion: 2\n")
    distribution(tmp_path / "site", "mine", "1")
    [found] = installed([str(checkout), str(tmp_path / "site")])
    assert (found.version, found.line, found.source) == ("2", None, checkout)


def test_what_installs_packages_stays_behind_unless_it_is_needed(
    tmp_path: Path,
) -> None:
    for name in ("pip", "uv", "wheel", "setuptools", "numpy"):
        distribution(tmp_path, name, "1")
    assert [p.name for p in installed([str(tmp_path)])] == ["numpy"]
    distribution(tmp_path, "old", "1", requires=["setuptools>=40"])
    names = [p.name for p in installed([str(tmp_path)])]
    assert names == ["numpy", "old", "setuptools"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("My.Package_x[extra]>=1; python_version>'3'", "my-package-x"), ("a", "a")],
)
def test_a_package_has_one_name(text: str, name: str) -> None:
    assert normalized(text) == name


# --- indexes ----------------------------------------------------------------------------


@pytest.fixture
def no_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.mark.usefixtures("no_indexes")
def test_indexes_come_from_the_variables_of_pip_and_uv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert indexes.find() == Indexes()
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip.test/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.test https://b.test")
    monkeypatch.setenv("UV_INDEX", "ours=https://b.test https://c.test/x=y")
    found = indexes.find()
    assert found.default == "https://pip.test/simple"
    assert found.extra == ("https://b.test", "https://c.test/x=y", "https://a.test")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://uv.test/simple")
    assert indexes.find().default == "https://uv.test/simple"


@pytest.mark.usefixtures("no_indexes")
def test_indexes_come_from_the_files_of_pip_and_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, uv = tmp_path / "pip.conf", tmp_path / "uv.toml"
    pip.write_text(
        "[global]\nindex-url = https://p.test\nfind-links =\n  /a\n  /b\n"
        "[install]\nextra-index-url = https://q.test\n"
    )
    uv.write_text('[[index]]\nurl = "https://u.test"\n[pip]\nfind-links = ["/c"]\n')
    monkeypatch.setenv("PIP_CONFIG_FILE", str(pip))
    monkeypatch.setenv("UV_CONFIG_FILE", str(uv))
    found = indexes.find()
    assert found.default == "https://p.test"
    assert {"https://u.test", "https://q.test"} <= set(found.extra)
    assert {"/a", "/b", "/c"} <= set(found.find_links)


def test_a_login_is_not_stored_and_the_index_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with_login = Indexes(default="https://me:secret@ours.test:8443/simple?x=1")
    assert with_login.without_secrets().default == "https://ours.test:8443/simple?x=1"
    assert "https://ours.test:8443/simple?x=1" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ("a @ https://me:secret@ours.test/a-1.0.whl", "a @ https://ours.test/a-1.0.whl"),
        ("a @ git+https://secret@ours.test/a@v1", "a @ git+https://ours.test/a@v1"),
        ("a @ git+ssh://git@ours.test/a@v1", "a @ git+ssh://git@ours.test/a@v1"),
        ("a==1.0", "a==1.0"),
    ],
)
def test_a_login_in_a_packages_url_is_not_stored(
    asked: str, stored: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = capture._Target(python="3.11", platform="linux-x86_64", indexes=Indexes())
    assert capture._locked(target, [asked], {}).lock.requirements == (stored,)
    assert "secret" not in caplog.text
    assert bool(caplog.text) is ("secret" in asked)


# --- wheels -----------------------------------------------------------------------------


def test_a_checkout_is_built_once_for_each_state_and_always_the_same(
    tmp_path: Path,
) -> None:
    project = make_project(tmp_path / "p", "acme-lib", {"__init__.py": "x = 1\n"})
    package = Package(name="acme-lib", version="1.0", source=project)
    at = indexes.find()
    wheel = build(package, tmp_path / "cache", at)
    assert wheel.name.startswith("acme_lib-1.0-py")
    made = wheel.stat().st_mtime_ns
    assert build(package, tmp_path / "cache", at).stat().st_mtime_ns == made
    again = build(package, tmp_path / "elsewhere", at)  # as on another machine
    assert again.read_bytes() == wheel.read_bytes()
    (project / "acme_lib" / "__init__.py").write_text("x = 2  # edited\n")
    edited = build(package, tmp_path / "cache", at)
    assert edited.read_bytes() != wheel.read_bytes()


def test_what_cannot_be_built_is_named_with_what_to_do(tmp_path: Path) -> None:
    broken = make_project(tmp_path / "b", "broken-lib", {"__init__.py": ""})
    (broken / "pyproject.toml").write_text("[project]\nname = 'broken-lib'\n")
    at = indexes.find()
    for source, why in ((broken, "no wheel"), (tmp_path / "gone", "no longer exists")):
        package = Package(name="broken-lib", version="1", source=source)
        with pytest.raises(PackageError, match=why) as raised:
            build(package, tmp_path / "cache", at)
        assert "exclude=['broken-lib']" in str(raised.value)


# --- the lock ---------------------------------------------------------------------------


def own_wheel(tmp_path: Path) -> Package:
    project = make_project(tmp_path / "own", "starburst-executor", {"__init__.py": ""})
    return Package(name="starburst-executor", version="1.0", source=project)


def test_the_digest_tells_versions_and_sources_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_wheel(tmp_path)
    six = Package(name="six", version="1.16.0", line="six==1.16.0")
    first = prepare(Wishes(), platform=HERE, packages=[six, own])
    monkeypatch.setenv("STARBURST_CACHE", str(tmp_path / "another machine"))
    assert prepare(Wishes(), platform=HERE, packages=[own, six]).digest == first.digest
    newer = Package(name="six", version="1.17.0", line="six==1.17.0")
    second = prepare(Wishes(), platform=HERE, packages=[newer, own])
    assert own.source is not None
    (own.source / "starburst_executor" / "__init__.py").write_text("# edited\n")
    third = prepare(Wishes(), platform=HERE, packages=[newer, own])
    assert len({first.digest, second.digest, third.digest}) == 3
    assert first.lock.requirements == ("six==1.16.0",)
    assert (first.lock.python, first.lock.platform) == (PYTHON, HERE)


def test_what_was_found_to_be_there_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_wheel(tmp_path)
    six = Package(name="six", version="1.16.0", line="six==1.16.0")
    prepare(Wishes(), platform=HERE, packages=[six, own])
    monkeypatch.setattr("starburst_executor.environment.uv.uv", lambda: "/no/such/program")
    prepare(Wishes(), platform=HERE, packages=[six, own])


def test_a_package_that_cannot_be_had_is_named_at_once(tmp_path: Path) -> None:
    own = own_wheel(tmp_path)
    for line, platform in (
        ("pywin32==308", HERE),
        ("pywin32==308", FOREIGN),
        ("six==0.0.77", HERE),
    ):
        package = Package(name="some", version="1", line=line)
        with pytest.raises(PackageError, match=line.partition("=")[0]) as raised:
            prepare(Wishes(), platform=platform, packages=[package, own])
        assert "exclude=" in str(raised.value)


def test_versions_are_those_asked_for_with_what_they_need(tmp_path: Path) -> None:
    own = own_wheel(tmp_path)
    six = Package(name="six", version="1.16.0", line="six==1.16.0")
    tool = Package(name="some-tool", version="1", line="some-tool==1")
    wishes = Wishes(
        packages=("six==1.15.0", "python-dateutil==2.9.0.post0"), exclude=("Some_Tool",)
    )
    lock = prepare(wishes, platform=HERE, packages=[six, tool, own]).lock
    names = {line.partition("==")[0] for line in lock.requirements}
    assert names == {"six", "python-dateutil"}
    assert "six==1.15.0" in lock.requirements
    wishes = Wishes(requirements=("python-dateutil==2.9.0.post0", "six<1.17"))
    lock = prepare(wishes, platform=HERE, packages=[tool, own]).lock
    assert lock.requirements == ("python-dateutil==2.9.0.post0", "six==1.16.0")
    assert [wheel.name for wheel in lock.wheels] == ["starburst-executor"]


def test_another_platform_gets_what_it_needs_by_its_own_markers(tmp_path: Path) -> None:
    own = own_wheel(tmp_path)
    wishes = Wishes(packages=("click==8.1.8; platform_machine == 'aarch64'", "six"))
    lock = prepare(wishes, platform="linux-aarch64", packages=[own]).lock
    assert "click==8.1.8" in lock.requirements
    lock = prepare(wishes, platform="linux-x86_64", packages=[own]).lock
    assert [line.partition("==")[0] for line in lock.requirements] == ["six"]


# --- what is refused --------------------------------------------------------------------


def chosen(
    spec: WorkerSpec, environment: str | None = None, image: str | None = None
) -> tuple[str, str | None]:
    spec, _ = choose_environment(spec, environment, image, None, (), ())
    return spec.environment, spec.image


def test_what_is_said_or_not_said_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(LOCAL) == ("none", None)
    assert chosen(LOCAL, "sync") == ("sync", None)
    assert chosen(ECS) == ("sync", None)
    assert chosen(ECS, image="mine:1") == ("image", "mine:1")
    assert chosen(ECS, "sync", "mine:1") == ("sync", "mine:1")
    assert chosen(ECS, "none") == ("none", None)
    monkeypatch.setenv("STARBURST_IMAGE", "ours:2")
    assert chosen(ECS) == ("image", "ours:2")
    assert chosen(ECS, "sync") == ("sync", "ours:2")


@pytest.mark.parametrize(
    ("spec", "arguments", "says"),
    [
        (LOCAL, {"environment": "docker"}, "must be one of 'sync', 'image', 'none'"),
        (LOCAL, {"environment": "image"}, "not containers"),
        (LOCAL, {"image": "mine:1"}, 'launcher="ecs"'),
        (ECS, {"environment": "image"}, "needs image="),
        (ECS, {"environment": "none", "image": "mine:1"}, 'environment="image"'),
        (ECS, {"image": 7}, "name of a container image"),
        (LOCAL, {"packages": ["six"]}, 'add environment="sync"'),
        (LOCAL, {"exclude": ["six"]}, 'add environment="sync"'),
        (ECS, {"image": "mine:1", "requirements": ["six"]}, 'add environment="sync"'),
        (LOCAL, {"environment": "sync", "packages": "six"}, "must be a list"),
        (LOCAL, {"environment": "sync", "packages": ["==3"]}, "not a requirement"),
        (LOCAL, {"environment": "sync", "requirements": "no/such.txt"}, "cannot read the req"),
        (LOCAL, {"environment": "sync", "exclude": ["Starburst_Executor"]}, "cannot be left out"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_refused(
    spec: WorkerSpec, arguments: dict[str, object], says: str
) -> None:
    given: dict[str, object] = {
        "environment": None, "image": None, "requirements": None, "packages": (), "exclude": (),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=says):
        choose_environment(spec, **{**given, **arguments})  # type: ignore[arg-type]


def test_a_requirements_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# ours\nnumpy==2.1.0  # why\n\nsix\n")
    _, wishes = choose_environment(LOCAL, "sync", None, file, (), ())
    assert wishes.requirements == ("numpy==2.1.0", "six")
    file.write_text("--index-url https://x.test\nsix\n")
    with pytest.raises(ValueError, match="options are not supported"):
        choose_environment(LOCAL, "sync", None, file, (), ())


def test_what_is_refused_leaves_nothing_behind(directory_url: str) -> None:
    with pytest.raises(PackageError, match="six"):
        StarburstExecutor(1, store=directory_url, environment="sync", packages=["six==0.0.77"])
    assert not Path(directory_url).exists()


def test_attached_to_from_here_a_session_of_images_runs_on_what_is_here() -> None:
    spec = WorkerSpec(launcher="ecs", environment="image", image="mine:1")
    here = on_launcher(spec, "local")
    assert (here.launcher, here.environment, here.image) == ("local", "none", None)
    synced = WorkerSpec(launcher="ecs", environment="sync", lock="abc")
    assert on_launcher(synced, "local").lock == "abc"


# --- in the store -----------------------------------------------------------------------


def made_up(tmp_path: Path, requirement: str = "six==1.16.0") -> Prepared:
    wheel = tmp_path / "own-1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    lock = Lock(python=PYTHON, platform=HERE, requirements=(requirement,))
    return Prepared(lock=lock, files={wheel.name: wheel})


def test_shipping_twice_writes_the_lock_alone(store_url: str, tmp_path: Path) -> None:
    store = open_store(store_url)
    prepared = made_up(tmp_path)
    ship(store, prepared)
    prefix = f"environments/{prepared.digest}/"
    assert keys(store_url, "environments/") == [
        f"{prefix}lock.json",
        f"{prefix}wheels/own-1.0-py3-none-any.whl",
    ]
    prepared.files["own-1.0-py3-none-any.whl"].unlink()
    ship(store, prepared)
    store.close()


def test_one_worker_packs_and_the_others_do_not(store_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "env"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "a.py").write_text("a = 1\n")
    store = open_store(store_url)
    digest = made_up(tmp_path).digest
    busy = f"environments/{digest}/packing"
    store.create(busy, b"")
    assert not pack(store, digest, folder)
    store.delete([busy])
    assert pack(store, digest, folder)
    assert not pack(store, digest, folder)
    assert keys(store_url, "environments/") == [f"environments/{digest}/pack"]
    store.close()


def test_only_environments_that_nobody_uses_are_pruned(
    directory_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(directory_url)
    used, unused = made_up(tmp_path), made_up(tmp_path, "six==1.17.0")
    ship(store, used)
    ship(store, unused)
    assert list(prune(store, {used.digest}, 0)) == []  # a session may be about to begin
    monkeypatch.setattr("starburst_executor.environment.repository._YOUNGEST", -1.0)
    assert list(prune(store, {used.digest}, 9)) == []
    assert list(prune(store, {used.digest}, -1, dry_run=True)) == [unused.digest]
    assert list(prune(store, {used.digest}, -1)) == [unused.digest]
    left = {key.split("/")[1] for key in keys(directory_url, "environments/")}
    assert left == {used.digest}
    store.close()


def test_warnings_come_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A package without a wheel can be built there, perhaps: it is said, not refused."""
    own = own_wheel(tmp_path)
    source = Package(name="docopt", version="0.6.2", line="docopt==0.6.2")
    with caplog.at_level(logging.WARNING):
        prepare(Wishes(), platform=HERE, packages=[source, own])
        prepare(Wishes(), platform=HERE, packages=[source, own])
    assert caplog.text.count("docopt==0.6.2 has no usable wheels") == 1

"""Ships local modules with the session.

Pickle references functions and classes by module, so a worker must be able to import what the
caller imported. Installed packages are part of the environment; everything else (the caller's own
modules and packages) is packed here, one archive per top-level name, so that a change re-ships only
what changed.

A module is packed when it is first seen, and again only when it is reloaded (`importlib.reload`):
workers run the code that the caller runs, not what was saved since.

* client: `Tracker.refresh` at each submit returns the digests that its tasks need, and ships each
  archive once.
* worker: `unpack` returns the directory to put on a child's `sys.path`. Its file `ORIGINS` says
  where each file was packed (see `shipped_modules`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import site
import sys
import sysconfig
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple, TypeAlias

from starburst_executor.environment.shipped_modules import ORIGINS
from starburst_executor.errors import DamagedObject

__all__ = [
    "UNPACKED_MAX",
    "Archive",
    "Extra",
    "Source",
    "Tracker",
    "build_archive",
    "find_local_modules",
    "is_local",
    "unpack",
]

UNPACKED_MAX = 64 * 1024 * 1024  # bytes; each worker fetches and unpacks all of it

Extra: TypeAlias = str | os.PathLike[str] | ModuleType

# sitecustomize runs at start-up and is never unpickled; __mp_main__ is another name of __main__.
_SELF = __name__.partition(".")[0]
_NEVER = {"__main__", "__mp_main__", "sitecustomize", "usercustomize", _SELF}
_SUFFIXES = (".py", *EXTENSION_SUFFIXES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One top-level module: a file, or the directories of a package (several: a namespace)."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A source as it was packed."""

    source: Source
    digest: str
    data: bytes  # zip file
    size: int  # bytes, unpacked
    files: int
    loads: Mapping[str, object]
    """Its imported modules, each with an object that the import system recreates on each load."""


# --- which ------------------------------------------------------------------------


def find_local_modules(extra: Iterable[Extra] = ()) -> list[Source]:
    """The imported top-level modules that were not installed as packages, sorted by name.

    This excludes `__main__` (its functions are pickled by value), and modules from a zip file or
    without a file.

    Args:
        extra: More modules, imported or not: names, modules, paths of a `.py` file or of a package
            directory. Installed ones are included if named here.

    Raises:
        ModuleNotFoundError: a name in `extra` is not a module.
        ValueError: another item of `extra` cannot be shipped.
    """
    found = {
        name: source
        for name, module in sys.modules.copy().items()
        if "." not in name and name not in _NEVER
        if (source := _source(name, module, is_local)) is not None
    }
    for wanted in extra:
        source = _extra(wanted)
        found[source.name] = source
    return [found[name] for name in sorted(found)]


def _source(name: str, module: ModuleType, accept: Callable[[Path], bool]) -> Source | None:
    if not isinstance(module, ModuleType):  # sys.modules may contain anything
        return None
    attributes = vars(module)  # no getattr: lazy modules import on it
    file, folders = attributes.get("__file__"), attributes.get("__path__")
    return _located(name, file, folders, accept)


def _located(
    name: str,
    file: str | None,
    folders: Iterable[str] | None,
    accept: Callable[[Path], bool],
) -> Source | None:
    if file is not None and not Path(file).name.startswith("__init__."):
        # A file, even with a __path__: six and others have one without being a directory.
        place = Path(file).absolute()
        usable = place.name.endswith(_SUFFIXES) and place.is_file()
        paths = [place] if usable and accept(place) else []
    else:
        # A namespace package has no file, and may have local and installed directories.
        places = [Path(f).absolute() for f in _strings(folders) if f]
        paths = [place for place in places if place.is_dir() and accept(place)]
    return Source(name=name, paths=tuple(paths)) if paths else None


def _strings(folders: Iterable[str] | None) -> Iterable[str]:
    return () if folders is None or isinstance(folders, str) else folders


def is_local(path: Path) -> bool:
    """Whether a path is the caller's own: not in the standard library and not installed."""
    return not (_is_installed(path) or _is_installed(path.resolve()))


def _is_installed(path: Path) -> bool:
    if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return True
    return any(path.is_relative_to(root) for root in _installed_roots())


@functools.cache
def _installed_roots() -> frozenset[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    roots = {sysconfig.get_path(name) for name in names}
    roots.update(site.getsitepackages(), [site.getusersitepackages()])
    return frozenset(Path(r) for root in roots for r in (root, os.path.realpath(root)))


def _extra(wanted: Extra) -> Source:
    if isinstance(wanted, ModuleType):
        return _of_module(wanted)
    if isinstance(wanted, str) and not _looks_like_path(wanted):
        return _of_name(wanted)
    return _of_path(Path(wanted))


def _looks_like_path(text: str) -> bool:
    return os.sep in text or text.endswith(".py") or text.startswith((".", "~"))


def _of_module(module: ModuleType) -> Source:
    top = module.__name__.partition(".")[0]
    source = _source(top, sys.modules.get(top, module), lambda _: True)
    if source is None or top in _NEVER:
        raise _no_file(module.__name__)
    return source


def _of_name(name: str) -> Source:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"cannot ship {name!r}: it is neither a module name nor a path")
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(name)
        spec = spec and importlib.util.find_spec(top)
    except ModuleNotFoundError as error:
        raise _not_found(name) from error
    except ValueError:  # imported but without a spec: __main__, or created by hand
        return _of_module(sys.modules[top])
    if spec is None:
        raise _not_found(name)
    folders = spec.submodule_search_locations
    source = _located(top, spec.origin, folders, lambda _: True)
    if source is None or top in _NEVER:
        raise _no_file(name)
    return source


def _not_found(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"there is no module {name!r} to ship: it cannot be imported here. Check the "
        f"spelling and sys.path, or give the path of its file or directory",
        name=name,
    )


def _no_file(name: str) -> ValueError:
    return ValueError(
        f"module {name!r} cannot be shipped: only .py files, extension modules and package "
        f"directories can, not built-in modules, zip files or {_SELF} itself"
    )


def _of_path(path: Path) -> Source:
    place = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  resolves "..", not links
    if not place.exists():
        raise ValueError(f"cannot ship {str(path)!r}: there is no such file or directory")
    if place.is_file() and place.suffix != ".py":
        raise ValueError(f"cannot ship {str(path)!r}: it is not a .py file")
    name = place.stem if place.is_file() else place.name
    if not name.isidentifier():
        raise ValueError(f"cannot ship {str(path)!r}: nothing can import a {name!r}")
    if place.is_dir() and not any(n.endswith(_SUFFIXES) for n in _files(place)):
        raise ValueError(f"cannot ship {str(path)!r}: there is no module in it")
    return Source(name=name, paths=(place,))


# --- packing ----------------------------------------------------------------------


def build_archive(source: Source, loads: Mapping[str, object] | None = None) -> Archive:
    """Pack a source.

    The same files give the same archive. It omits hidden files and directories, bytecode, virtual
    environments, `node_modules`, and files that disappear meanwhile; it includes a package's data
    files.

    Raises:
        ValueError: it is over 64 MiB.
    """
    members = _members(source)
    size = sum(map(_size, members.values()))
    if size > UNPACKED_MAX:  # before reading all of it
        raise _too_much(size, source, size, len(members))
    read = ((name, _read(path)) for name, path in members.items())
    contents = {name: data for name, data in read if data is not None}
    return _packed(source, contents, members, loads or {})


def rebuild_archive(source: Source, old: Archive, loads: Mapping[str, object]) -> Archive:
    """Pack a source again after modules of it were loaded.

    Their files are read again; all others stay as packed, since the caller still runs their old
    code. New code is included, new data is not: the run may be writing it.
    """
    if source.paths != old.source.paths:
        return build_archive(source, loads)
    members = _members(source)
    names = {path: name for name, path in members.items()}
    loaded = {_file_of(name) for name in loads if old.loads.get(name) is not loads[name]}
    contents = _contents(old.data)
    for path, name in names.items():
        added = name not in contents and name.endswith(_SUFFIXES)
        if (path in loaded or added) and (data := _read(path)) is not None:
            contents[name] = data
    return _packed(source, contents, members, loads)


def _packed(
    source: Source,
    contents: Mapping[str, bytes],
    members: Mapping[str, Path],
    loads: Mapping[str, object],
) -> Archive:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, ORIGINS, _origins(source, members))
        for name, data in sorted(contents.items()):
            _add(archive, name, data)
    data = target.getvalue()
    return Archive(
        source=source,
        digest=hashlib.sha256(data).hexdigest(),
        data=data,
        size=sum(map(len, contents.values())),
        files=len(contents),
        loads=loads,
    )


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980: only content should affect the digest
    info.external_attr = 0o644 << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, data)


def _contents(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name != ORIGINS]
        return {name: archive.read(name) for name in names}


def _origins(source: Source, members: Mapping[str, Path]) -> bytes:
    """Where files were packed, by name in the archive; a directory covers everything below it."""
    if len(source.paths) > 1:  # a namespace; its files may be in any of them
        found = {name: str(path) for name, path in members.items()}
    elif source.paths[0].is_dir():
        found = {source.name: str(source.paths[0])}
    else:
        found = {name: str(path) for name, path in members.items()}
    return json.dumps(found, sort_keys=True).encode()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):  # other processes create and delete files here
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _members(source: Source) -> dict[str, Path]:
    """Name in the archive -> file; named after the module, as the file may not be."""
    members: dict[str, Path] = {}
    for place in source.paths:
        if place.is_file():
            suffix = next(s for s in _by_length(_SUFFIXES) if place.name.endswith(s))
            members.setdefault(source.name + suffix, place)
        else:
            for name, path in _files(place).items():
                members.setdefault(f"{source.name}/{name}", path)
    return members


def _by_length(suffixes: Iterable[str]) -> list[str]:
    return sorted(suffixes, key=len, reverse=True)  # ".abi3.so" before ".so"


def _files(folder: Path) -> dict[str, Path]:
    """The files of a package to ship, by relative name."""
    return dict(_walk(folder, "", frozenset()))


def _walk(folder: Path, above: str, parents: frozenset[str]) -> Iterator[tuple[str, Path]]:
    real = os.path.realpath(folder)
    if real in parents or (folder / "pyvenv.cfg").exists():
        return  # a link to a parent directory, or a virtual environment
    for path in _entries(folder):
        if path.name.startswith(".") or path.name in ("__pycache__", "node_modules"):
            continue
        if path.is_dir():
            yield from _walk(path, f"{above}{path.name}/", parents | {real})
        elif path.is_file() and path.suffix not in (".pyc", ".pyo"):
            yield above + path.name, path


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # removed just now
        return []


def _check_total(archives: Iterable[Archive]) -> None:
    total = sum(archive.size for archive in archives)
    if total > UNPACKED_MAX:
        biggest = max(archives, key=lambda archive: archive.size)
        raise _too_much(total, biggest.source, biggest.size, biggest.files)


def _too_much(total: int, source: Source, size: int, files: int) -> ValueError:
    places = ", ".join(map(str, source.paths))
    return ValueError(
        f"the local modules total {_mib(total)}, and a session ships at most "
        f"{_mib(UNPACKED_MAX)}. The biggest is {source.name!r}: {_mib(size)} in "
        f"{files} files ({places}). Keep data out of the package directory and "
        f"pass it as an argument or through the store; or install the package, here (not as "
        f"editable) and for the workers, so that it is not shipped"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


# --- keeping up -------------------------------------------------------------------


class Tracker:
    """Tracks which archives newly submitted tasks need.

    It notices imports and reloads, but not edits to an imported file: the caller still runs the old
    code too.

    Args:
        ship: Called as `ship(digest, archive)` once per digest. If it raises, so does `refresh`,
            and the next call tries again.
        extra: As for `find_local_modules`.

    Raises:
        ModuleNotFoundError, ValueError: an item of `extra` cannot be shipped.
    """

    def __init__(self, ship: Callable[[str, bytes], None], extra: Iterable[Extra] = ()) -> None:
        self._ship = ship
        self._extra = {source.name: source for source in map(_extra, extra)}
        self._lock = threading.Lock()
        self._seen: _Imports | None = None
        self._archives: dict[str, Archive] = {}
        self._shipped: set[str] = set()
        self._digests: dict[str, str] = {}

    def refresh(self) -> dict[str, str]:
        """The digest of each local module, by name; all are shipped before this returns.

        Takes microseconds unless something new was imported. The dictionary may be kept but must
        not be changed.

        Raises:
            ValueError: together they exceed 64 MiB.
        """
        if _unchanged(self._seen):
            return self._digests
        with self._lock:
            if not _unchanged(self._seen):
                seen = _imports()
                self._digests = self._scan()
                self._seen = seen  # last: a thread that sees it reads the digests without the lock
            return self._digests

    def _scan(self) -> dict[str, str]:
        sources = {source.name: source for source in find_local_modules()} | self._extra
        for name, archive in self._archives.items():
            if name in sys.modules:  # its file may be gone, but the archive is not
                sources.setdefault(name, archive.source)
        loads = _loads(sources.keys())
        archives = {name: self._archive(sources[name], loads[name]) for name in sorted(sources)}
        _check_total(archives.values())
        self._archives = archives
        for archive in archives.values():
            if archive.digest not in self._shipped:
                self._ship(archive.digest, archive.data)
                self._shipped.add(archive.digest)
        return {name: archive.digest for name, archive in archives.items()}

    def _archive(self, source: Source, loads: Mapping[str, object]) -> Archive:
        old = self._archives.get(source.name)
        if old is None:
            return build_archive(source, loads)
        if all(old.loads.get(name) is load for name, load in loads.items()):
            return old
        return rebuild_archive(source, old, loads)


class _Imports(NamedTuple):
    """Compares unequal, by identity of its objects, after every import and reload."""

    number: int
    last: str
    module: object
    load: object


def _imports() -> _Imports:
    last = next(reversed(sys.modules))
    module = sys.modules.get(last)
    return _Imports(len(sys.modules), last, module, _load_of(module))


def _unchanged(seen: _Imports | None) -> bool:
    if seen is None:
        return False
    now = _imports()
    return now.load is seen.load and now.module is seen.module and now[:2] == seen[:2]


def _load_of(module: object) -> object:
    """An object that changes with each load of a module: its spec, if it has one."""
    if not isinstance(module, ModuleType):
        return module
    # No getattr: lazy modules import on it.
    return object.__getattribute__(module, "__dict__").get("__spec__") or module


def _loads(names: Collection[str]) -> dict[str, dict[str, object]]:
    """For each top-level name, its imported modules with their loads."""
    found: dict[str, dict[str, object]] = {name: {} for name in names}
    for name, module in sys.modules.copy().items():
        top = name.partition(".")[0]
        if top in found:
            found[top][name] = _load_of(module)
    return found


def _file_of(name: str) -> Path | None:
    module = sys.modules.get(name)
    if not isinstance(module, ModuleType):
        return None
    file = object.__getattribute__(module, "__dict__").get("__file__")
    return Path(file).absolute() if isinstance(file, str) else None


# --- on the worker ----------------------------------------------------------------


def unpack(archive: bytes | Path, folder: Path) -> Path:
    """Unpack an archive below `folder` unless already there; returns the `sys.path` directory.

    Any number of processes may do so at once: the directory, named after the archive's digest,
    appears complete or not at all.

    Raises:
        DamagedObject: it is not a valid archive.
    """
    data = archive if isinstance(archive, bytes) else archive.read_bytes()
    target = folder / hashlib.sha256(data).hexdigest()
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
    try:
        _extract(data, draft)
        _publish(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _publish(draft: Path, target: Path) -> None:
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with equal content
            raise


def _extract(data: bytes, draft: Path) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                _check_member(name)
            archive.extractall(draft)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise DamagedObject(f"an archive of modules is damaged: {error}") from error


def _check_member(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DamagedObject(f"an archive of modules names a path outside of it: {name!r}")

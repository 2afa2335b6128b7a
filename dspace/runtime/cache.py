"""The cache on disk: generated modules, an index of them, certificates.

Layout of the cache folder::

    entries/KEY.json         name, spec hash and module file of one key (a key hashes raw spec bytes or a spec hash,
                             together with the compiler's version)
    modules/NAME_SHA.py      a generated module, named by the hash of its own text: damage shows, equal text is shared
    mathematics/KEY.json     the first module of a mathematics, whatever its names (KEY hashes the canonical form)
    certificates/KEY.json    what verification said of one module on one machine
    tuning/KEY.json          configurations that were measured to be the fastest on one GPU
    locks/KEY.lock           held by the process that builds KEY while the others wait

Every file is written beside its place and moved there, so that a reader sees all of it or nothing, and a killed
process leaves at most a stray ``*.tmp``. Nothing here imports torch or SymPy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspace.errors import UserError

ENVIRONMENT = "DSPACE_CACHE"
"""Environment variable that names the cache folder."""

LOCK_TIMEOUT = 300.0
"""Seconds to wait for another process that compiles the same spec."""

_fallback: Path | None = None


@dataclass(frozen=True)
class Entry:
    """What the index knows of one key: the variant's ``name``, its ``spec_hash`` and its module (``sha256``).

    ``kernels`` is there where another module has the same mathematics in other words: see
    :mod:`dspace.runtime.sharing`.
    """

    name: str
    spec_hash: str
    sha256: str
    kernels: dict[str, Any] | None = None


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts, each with its length, as hex."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode())
        total.update(data)
    return total.hexdigest()


def default_dir() -> Path:
    """``$DSPACE_CACHE``, or the user's cache folder of this platform."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("dspace", appauthor=False))


def writable(folder: Path) -> bool:
    """Whether a file can be created in ``folder``, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe") as probe:
            probe.write(b"0")
    except OSError:
        return False
    return True


class Cache:
    """One cache folder. A folder that cannot be written is still read; what is new then goes to a temporary one."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else default_dir()

    def entry(self, key: str) -> Entry | None:
        """The entry of ``key``, or None if there is none or it is damaged."""
        for root in self._roots():
            with contextlib.suppress(OSError, ValueError, TypeError):
                return Entry(**json.loads((root / "entries" / f"{key}.json").read_text(encoding="utf-8")))
        return None

    def module(self, entry: Entry) -> Path | None:
        """Path of an intact module file, or None if it is missing or its text is not what was written."""
        for root in self._roots():
            path = root / "modules" / module_file(entry)
            with contextlib.suppress(OSError):
                if hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256:
                    return path
        return None

    def store_module(
        self, name: str, spec_hash: str, text: str, keys: list[str], kernels: dict[str, Any] | None = None
    ) -> tuple[Entry, Path]:
        """Write a module and its entry under every key; returns the entry and the module's path."""
        data = text.encode()
        entry = Entry(name, spec_hash, hashlib.sha256(data).hexdigest(), kernels)

        def write(root: Path) -> Path:
            path = _replace(root / "modules" / module_file(entry), data)
            record = json.dumps(vars(entry), indent=1).encode()
            for key in keys:
                _replace(root / "entries" / f"{key}.json", record)
            return path

        return entry, self._write(write)

    def mathematics(self, key: str) -> dict[str, Any] | None:
        """The first module of a mathematics, or None if there is none yet or its record is damaged."""
        for root in self._roots():
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((root / "mathematics" / f"{key}.json").read_text(encoding="utf-8"))
                if isinstance(found, dict) and {"name", "spec_hash", "sha256", "variables", "states"} <= set(found):
                    return found
        return None

    def store_mathematics(self, key: str, record: dict[str, Any]) -> Path:
        """Write the record of the first module of a mathematics."""
        data = json.dumps(record, indent=1).encode()
        return self._write(lambda root: _replace(root / "mathematics" / f"{key}.json", data))

    def certificate(self, key: str) -> dict[str, Any] | None:
        """The certificate of ``key``, or None if there is none or it is damaged."""
        for root in self._roots():
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((root / "certificates" / f"{key}.json").read_text(encoding="utf-8"))
                if isinstance(found, dict) and "passed" in found:
                    return found
        return None

    def store_certificate(self, key: str, certificate: dict[str, Any]) -> Path:
        """Write a certificate; returns its path."""
        data = json.dumps(certificate, indent=1).encode()
        return self._write(lambda root: _replace(root / "certificates" / f"{key}.json", data))

    def was_called(self, key: str) -> bool:
        """Whether the first call of a form was seen to (:mod:`dspace.runtime.first`)."""
        return any((root / "calls" / key).is_file() for root in self._roots())

    def store_called(self, key: str) -> Path:
        """Note that the first call of a form was seen to."""
        return self._write(lambda root: _replace(root / "calls" / key, b""))

    def tuning(self, key: str) -> dict[str, Any]:
        """Configurations by key; empty where nothing was tuned or the file is damaged."""
        known: dict[str, Any] = {}
        for root in self._roots():
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((root / "tuning" / f"{key}.json").read_text(encoding="utf-8"))
                known |= found if isinstance(found, dict) else {}
        return known

    def store_tuning(self, key: str, choices: dict[str, Any]) -> Path:
        """Write configurations by key; returns the file's path."""
        data = json.dumps(choices, indent=1).encode()
        return self._write(lambda root: _replace(root / "tuning" / f"{key}.json", data))

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of ``key`` against other processes; without one where the folder cannot be written."""
        import filelock

        root = self._writable_root()
        path = root / "locks" / f"{key}.lock"
        held = filelock.FileLock(str(path), timeout=LOCK_TIMEOUT)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.acquire()
        except filelock.Timeout as error:
            raise UserError(
                f"another process has held the compile lock for {LOCK_TIMEOUT:.0f} s: {path}\n"
                f"  cure: wait for that process, or end it and try again; or set {ENVIRONMENT} to another folder"
            ) from error
        except (OSError, NotImplementedError):
            # Read-only folder or a file system without locks: writes stay atomic, work may be done twice.
            yield
            return
        try:
            yield
        finally:
            held.release()

    def _roots(self) -> tuple[Path, ...]:
        return (self.folder,) if _fallback is None else (self.folder, _fallback)

    def _writable_root(self) -> Path:
        return self.folder if writable(self.folder) else fallback_dir(self.folder)

    def _write(self, write: Any) -> Path:
        try:
            return write(self.folder)
        except OSError as error:
            root = fallback_dir(self.folder, error)
        try:
            return write(root)
        except OSError as error:
            raise UserError(
                f"cannot write the cache folder {self.folder} nor the temporary folder {root}: {error}\n"
                f"  cure: free some space, or set {ENVIRONMENT} to a folder that can be written"
            ) from error


def fallback_dir(wanted: Path, error: OSError | None = None) -> Path:
    """A temporary cache folder for this process, with one warning that says why."""
    global _fallback
    if _fallback is None:
        try:
            _fallback = Path(tempfile.mkdtemp(prefix="dspace-cache-"))
        except OSError as second:
            raise UserError(
                f"cannot write the cache folder {wanted} and there is no temporary folder either: {second}\n"
                f"  cure: free some space, or set {ENVIRONMENT} to a folder that can be written"
            ) from second
        reason = f" ({error.strerror or error})" if error is not None else ""
        warnings.warn(
            f"the cache folder {wanted} cannot be written{reason}; this process compiles into {_fallback}, "
            f"which later ones will not find. Set {ENVIRONMENT} to a folder that can be written.",
            stacklevel=4,
        )
    return _fallback


def module_file(entry: Entry) -> str:
    """File name of an entry's module."""
    return f"{entry.name}_{entry.sha256[:24]}.py"


def _replace(path: Path, data: bytes) -> Path:
    """Put ``data`` at ``path`` in one step; the file is on disk before it gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path

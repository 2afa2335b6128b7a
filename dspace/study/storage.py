"""Where a study lives: a folder with one Optuna journal, artifacts and locks, or another Optuna storage.

    runs/NAME/journal.log     Optuna's journal (one JSON record a line); optuna-dashboard opens it too
    runs/NAME/study.toml      the study file as it was run
    runs/NAME/artifacts/      what trials leave behind (spec, weights, kernel), by Optuna's artifact ids
    runs/NAME/workers/        one lock per living worker: the kernel releases it even after kill -9

A record is appended whole or not at all: when the disk fills up or the process is interrupted in the middle of
a write, what was written of it is taken back while the lock is still held.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspace.errors import StorageError
from dspace.study import remote

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"


@dataclass(frozen=True)
class Home:
    """The folder of a study, and the URL of its storage when that is not the folder's journal."""

    folder: Path
    url: str | None = None

    @property
    def on_server(self) -> bool:
        """Whether workers on other machines can reach the storage: then locks of this machine do not bind them."""
        return self.url is not None and not self.url.startswith("sqlite")

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    @property
    def definition(self) -> Path:
        return self.folder / "study.toml"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def workers(self) -> Path:
        return self.folder / "workers"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def home_of(name: str, folder: str | Path | None = None, url: str | None = None) -> Home:
    """The home of study ``name``: ``runs/NAME`` of the current folder unless told otherwise."""
    return Home(Path(folder) if folder else Path("runs") / name, url)


def prepare(home: Home) -> None:
    """Make the folder and see that it can be written, before any work is spent."""
    with storage_errors(home):
        for folder in (home.folder, home.artifacts, home.workers):
            folder.mkdir(parents=True, exist_ok=True)
        probe = home.workers / f".probe-{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
        if home.url is None:
            if home.journal.is_dir():
                raise StorageError(f"{home.journal} is a folder\n  cure: move it away, or choose another --dir")
            with open(home.journal, "ab"):
                pass


def connect(home: Home, patience: float = 5.0) -> optuna.storages.BaseStorage:
    """Open the storage of ``home``, waiting ``patience`` seconds for a server that does not answer.

    Raises StorageError for one that is damaged or out of reach.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # the gRPC proxy
    if home.url is not None:
        return remote.connect_server(home.url, patience) if home.on_server else remote.open_database(home.url)
    damage = find_damage(home.journal)
    if damage is not None:
        raise StorageError(str(damage))
    with storage_errors(home):
        backend = _journal_backend(home.journal)
        try:
            return optuna.storages.JournalStorage(backend)
        except (KeyError, AssertionError, ValueError, TypeError) as error:
            raise StorageError(
                f"{home.journal}: the records are readable but not a journal of Optuna ({type(error).__name__}: {error})\n"
                "  cure: check that this is the right file; it was not changed"
            ) from None


def _journal_backend(path: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import get_lock_file

    class WholeRecords(JournalFileBackend):
        """A journal whose records are whole: a failed append is taken back."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            data = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
            # Signals wait until the record is written and the lock released: neither may be left half done.
            with _signals_held(), get_lock_file(self._lock):
                handle = os.open(self._file_path, os.O_WRONLY | os.O_APPEND)
                try:
                    before = os.fstat(handle).st_size
                    try:
                        rest = memoryview(data)
                        while rest:
                            rest = rest[os.write(handle, rest) :]
                        os.fsync(handle)
                    except OSError:
                        os.ftruncate(handle, before)
                        raise
                finally:
                    os.close(handle)

    # The lock is a symbolic link to the path as given: a relative one would point nowhere, and Optuna would wait
    # for ever for a lock whose age it cannot read.
    return WholeRecords(str(path.resolve()))


@contextmanager
def _signals_held() -> Iterator[None]:
    """Put off Ctrl-C and termination until the block is done."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def storage_errors(home: Home) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what is lost (nothing) and what to do."""
    try:
        yield
    except OSError as error:
        raise explain(error, home) from None


def explain(error: OSError, home: Home) -> StorageError:
    where = error.filename or home.folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{where}: the disk is full; every finished trial is safe\n"
            "  cure: free some space and give the same command again: it goes on where it stopped"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"{where}: cannot be written ({error.strerror})\n"
            "  cure: make it writable, or choose another place with --dir; nothing was changed"
        )
    return StorageError(f"{where}: {error.strerror or error}\n  cure: check that the path exists and is a folder")


@dataclass(frozen=True)
class Damage:
    """Where a journal stops being readable: ``line`` from 1, ``offset`` in bytes, ``after`` lines behind it."""

    path: Path
    line: int
    offset: int
    after: int
    reason: str

    @property
    def at_tail(self) -> bool:
        return self.after == 0

    def __str__(self) -> str:
        whole = f"the {self.line - 1} records before it are whole"
        if self.at_tail:
            cure = f"dspace study heal {self.path.parent} --cut  (keeps a copy of the file, then cuts this last record)"
        else:
            cure = (
                f"restore the file from a copy; or `dspace study heal {self.path.parent} --cut` keeps a copy and cuts "
                f"line {self.line} and the {self.after} lines behind it"
            )
        return f"{self.path}: damaged at line {self.line} (byte {self.offset}): {self.reason}; {whole}\n  cure: {cure}"


def find_damage(path: Path) -> Damage | None:
    """The first unreadable record of a journal, or None. Raises StorageError when the file cannot be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, Home(path.parent)) from None
    offset, lines = 0, data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            if "op_code" not in json.loads(line):
                raise ValueError("not a record")
        except (ValueError, TypeError):
            after = len(lines) - 1 - number + (1 if lines[-1] else 0)
            return Damage(path, number, offset, after, "not a record of a journal")
        offset += len(line) + 1
    if lines[-1]:
        return Damage(path, len(lines), offset, 0, "the last record has no end (the machine stopped while writing it)")
    return None


def cut_damage(home: Home) -> tuple[Damage, Path] | None:
    """Copy the journal beside itself, then cut it where it stops being readable. None if it is whole."""
    damage = find_damage(home.journal)
    if damage is None:
        return None
    if any(living_workers(home)):
        raise StorageError("workers of this study are alive\n  cure: stop them first")
    copy = home.journal.with_name(f"journal.{time.strftime('%Y%m%d-%H%M%S')}.damaged")
    with storage_errors(home):
        copy.write_bytes(home.journal.read_bytes())
        os.truncate(home.journal, damage.offset)
    return damage, copy


# -- which workers are alive -------------------------------------------------------------------------------


def worker_lock(home: Home, worker: str) -> Any:
    """The lock that a living worker holds."""
    from filelock import FileLock

    return FileLock(str(home.workers / f"{worker}.lock"))


def is_alive(home: Home, worker: str) -> bool:
    """Whether the worker's process still holds its lock (a lock file that is gone belongs to nobody)."""
    from filelock import Timeout

    if not (home.workers / f"{worker}.lock").exists():
        return False
    lock = worker_lock(home, worker)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def living_workers(home: Home) -> list[str]:
    names = sorted(p.stem for p in home.workers.glob("*.lock")) if home.workers.is_dir() else []
    return [name for name in names if name != "claim" and is_alive(home, name)]

"""Storages on a server: PostgreSQL (or MySQL) reached directly, or through Optuna's gRPC proxy for many machines.

Workers outlive a server that goes away: every call is repeated until it answers again, see :mod:`dspace.study.patient`. Signs of
life are an attribute of the running trial, because Optuna's own heartbeat does not pass its gRPC proxy.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from dspace.errors import StorageError
from dspace.study.away import hidden

BEAT = "beat"
"""Attribute of a running trial: the time (seconds since the epoch) of its worker's last sign of life."""

DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}
"""The driver used where a URL names none."""


def check_url(url: str | None, jobs: int) -> None:
    """Refuse storages that are known to lose data or lock up with several workers."""
    if url is None:
        return
    if url.startswith("sqlite") and jobs > 1:
        raise StorageError(
            f"SQLite with {jobs} workers is refused: writers lock each other out ('database is locked')\n"
            "  cure: leave --storage out (a journal file takes many workers), or use --jobs 1, or PostgreSQL"
        )
    if not re.match(r"(sqlite|postgresql|mysql|grpc)(\+\w+)?://", url):
        raise StorageError(
            f"unknown storage {hidden(url)!r}\n  cure: leave --storage out, or give sqlite:///..., "
            "postgresql://USER@HOST/DATABASE, mysql://... or grpc://HOST:PORT"
        )
    if url.startswith("grpc"):
        host_and_port(url)


def check_proxied(url: str | None) -> str:
    """The URL that a proxy may stand before. Refuses journal files and SQLite, with the reason."""
    if url is None or "://" not in url:
        raise StorageError(
            "a gRPC proxy before a journal file is refused: Optuna's proxy loses track of a journal's trials "
            "(optuna issue 6084)\n  cure: put it before PostgreSQL, --storage postgresql://USER@HOST/DATABASE; "
            "on one machine a journal file needs no proxy"
        )
    if url.startswith("sqlite"):
        raise StorageError(
            "a gRPC proxy before SQLite is refused: its threads lock each other out ('database is locked')\n"
            "  cure: put it before PostgreSQL, --storage postgresql://USER@HOST/DATABASE"
        )
    if url.startswith("grpc"):
        raise StorageError("a proxy before a proxy serves nobody\n  cure: --storage postgresql://USER@HOST/DATABASE")
    check_url(url, 1)
    return url


def host_and_port(url: str) -> tuple[str, int]:
    """``grpc://HOST:PORT`` -> both; the port is 13000 unless given."""
    try:
        parts = urlsplit(url)
        if parts.hostname:
            return parts.hostname, parts.port or 13000
    except ValueError:
        pass
    raise StorageError(f"{url!r} names no host and port\n  cure: grpc://HOST:13000")


def open_database(url: str, threads: int = 1) -> Any:
    """Optuna's storage for a database URL, with the newest drivers chosen and dead connections noticed."""
    import optuna

    scheme, rest = url.split("://", 1)
    full = f"{scheme}+{DRIVERS[scheme]}://{rest}" if scheme in DRIVERS else url
    try:
        database = optuna.storages.RDBStorage(
            full, engine_kwargs={"pool_pre_ping": True, "pool_size": max(threads, 2), "max_overflow": threads}
        )
    except Exception as error:  # any driver may raise anything here
        raise StorageError(_unreachable(url, error)) from None
    from dspace.study.database import Database

    return Database(database)


def _unreachable(url: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"cannot open {hidden(url)}: {error}\n  cure: pip install 'dspace[server]'"
    first = hidden(str(error)).strip().split("\n")[0]
    return f"cannot open {hidden(url)}: {first}\n  cure: check the address, the password and that the server runs"


def open_proxy(url: str, patience: float) -> Any:
    """The client of a proxy, once it answers."""
    host, port = host_and_port(url)
    try:
        from dspace.study.proxy import Client

        client = Client(host=host, port=port)
        client.wait_server_ready(timeout=max(patience, 1.0))
        return client
    except ImportError as error:
        raise StorageError(_unreachable(url, error)) from None
    except (ConnectionError, TimeoutError):
        raise StorageError(
            f"no proxy answers at {host}:{port}\n"
            f"  cure: start it there: dspace study proxy --storage postgresql://USER@HOST/DATABASE --port {port}"
        ) from None


def connect_server(url: str, patience: float = 5.0) -> Any:
    """A storage on a server that is patient with it. Raises StorageError when it cannot be reached at all."""
    end = time.time() + patience
    while True:
        try:
            inner = open_proxy(url, patience) if url.startswith("grpc") else open_database(url)
            from dspace.study.patient import Patient

            return Patient(inner, patience)
        except StorageError as error:
            if time.time() + 1 > end or "pip install" in str(error):
                raise
            time.sleep(1.0)


@contextmanager
def heartbeat(storage: Any, running: list[Any], every: float) -> Iterator[None]:
    """Give signs of life for the trials in ``running`` (which may grow and shrink) while the block runs."""
    done = threading.Event()
    patient = getattr(storage, "_patience", None)
    storage = patient.inner if patient is not None else storage  # a sign of life that fails is not worth repeating

    def beat() -> None:
        while not done.wait(every):
            for trial in list(running):
                with suppress(Exception):  # finished meanwhile, or no server: the block will hear of it itself
                    storage.set_trial_user_attr(trial._trial_id, BEAT, time.time())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5.0)


class Watch:
    """Which running trials have shown no sign of life for ``grace`` seconds, by the clock of the watcher alone."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.seen: dict[int, tuple[Any, float]] = {}

    def is_lost(self, trial: Any) -> bool:
        """Whether the trial's sign of life has not changed since it was first seen, ``grace`` seconds ago or more."""
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        known = self.seen.get(trial._trial_id)
        if known is None or known[0] != beat:
            self.seen[trial._trial_id] = (beat, now)
            return False
        return now - known[1] > self.grace


class ByClock(Watch):
    """The same at once, by comparing clocks: for healing by hand. Machines whose clocks differ need a longer grace."""

    def is_lost(self, trial: Any) -> bool:
        started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - float(trial.user_attrs.get(BEAT, started)) > self.grace


def run_proxy(url: str | None, host: str, port: int, threads: int = 16) -> None:
    """Serve a database to many machines until interrupted. Raises StorageError for storages that do not bear it."""
    from concurrent.futures import ThreadPoolExecutor

    checked = check_proxied(url)
    try:
        from dspace.study.proxy import serve
    except ImportError as error:
        raise StorageError(_unreachable(checked, error)) from None
    database = open_database(checked, threads)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            warnings.simplefilter("ignore")  # it is experimental since Optuna 4.2
            serve(database, host, port, pool)
        except RuntimeError as error:
            raise StorageError(f"cannot serve at {host}:{port}: {error}\n  cure: another --host or --port") from None

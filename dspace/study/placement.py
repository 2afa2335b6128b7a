"""Where workers run: processes of this machine, tasks of a Ray cluster, or jobs of Slurm.

A placement starts the same command in each place and says whether it has ended. It never chooses what a worker does:
trials are Optuna's, and a placement that loses a worker costs that worker's running trial, which is repeated.
"""

from __future__ import annotations

import abc
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dspace.errors import UserError
from dspace.study.schema import WorkersTable

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
KILLED = -9
"""The code of a worker whose place is gone without a word."""


class Handle(abc.ABC):
    """One started worker."""

    @abc.abstractmethod
    def poll(self) -> int | None:
        """None while it runs, else its exit code (negative: the signal that killed it)."""

    @abc.abstractmethod
    def ask_to_stop(self) -> None:
        """Let it give its trial back and end."""

    @abc.abstractmethod
    def kill(self) -> None:
        """End it at once and wait until it has ended."""

    def last_words(self) -> str:
        """What it said before it ended, where that is known here."""
        return ""


class Placement(abc.ABC):
    """Starts workers."""

    name = "here"

    @abc.abstractmethod
    def start(self, command: list[str], environment: dict[str, str], log: Path) -> Handle:
        """Start ``command`` with these variables added; what it prints goes to ``log``."""

    def close(self) -> None:
        """Let go of the cluster."""
        return None


class _Process(Handle):
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def poll(self) -> int | None:
        return self.process.poll()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def ask_to_stop(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.process.poll() is None:
            self._signal(signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        return self.log.read_text(errors="replace").strip() if self.log.exists() else ""


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    folder = Path("/proc/driver/nvidia/gpus")
    if folder.is_dir():
        return [str(i) for i in range(len(list(folder.iterdir())))]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


class Here(Placement):
    """Processes of this machine, each with its share of the cores; of several GPUs each gets one, in turn."""

    def __init__(self, jobs: int) -> None:
        self.threads = str(max((os.cpu_count() or 1) // jobs, 1))
        self.gpus = visible_gpus()
        self.held: list[tuple[str, Handle]] = []

    def next_gpu(self) -> str | None:
        """The GPU with the fewest living workers, where there are several."""
        if len(self.gpus) < 2:
            return None
        living = [gpu for gpu, worker in self.held if worker.poll() is None]
        return min(self.gpus, key=living.count)

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> Handle:
        everything = {**os.environ, **dict.fromkeys(THREADS, self.threads), **environment}
        gpu = self.next_gpu()
        if gpu is not None:
            everything["CUDA_VISIBLE_DEVICES"] = gpu
        with open(log, "wb") as output:
            # Its own session: Ctrl-C in the terminal reaches the engine alone.
            process = subprocess.Popen(
                command,
                env=everything,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        handle = _Process(process, log)
        if gpu is not None:
            self.held.append((gpu, handle))
        return handle


def run_command(command: list[str], environment: dict[str, str], threads: int) -> tuple[int, str]:
    """Run a worker where this is called, in a process of its own; its exit code and the end of what it said."""
    everything = {**os.environ, **dict.fromkeys(THREADS, str(max(threads, 1))), **environment}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=everything, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        except BaseException:  # cancelled: the worker gives its trial back
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        output.seek(0, os.SEEK_END)
        output.seek(max(output.tell() - 20_000, 0))
        return code, output.read().decode(errors="replace")


class _RayTask(Handle):
    def __init__(self, ray: Any, task: Any, log: Path) -> None:
        self.ray, self.task, self.log, self.words = ray, task, log, ""
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None and self.ray.wait([self.task], timeout=0)[0]:
            try:
                self.code, self.words = self.ray.get(self.task)
            except Exception as error:  # the task's process was killed, or its node is gone
                self.code, self.words = KILLED, f"Ray lost the worker: {type(error).__name__}: {error}"
            self.log.write_text(self.words)
        return self.code

    def ask_to_stop(self) -> None:
        self.ray.cancel(self.task)  # the worker sees that its parent is gone, and gives its trial back

    def kill(self) -> None:
        if self.poll() is None:
            self.ray.cancel(self.task, force=True)
        end = time.time() + 10
        while self.poll() is None and time.time() < end:
            time.sleep(0.1)

    def last_words(self) -> str:
        return self.words


class Ray(Placement):
    """Core tasks of a Ray cluster: ``cpus`` and ``gpus`` (a fraction shares one) say where a worker fits.

    Ray only places workers. Its own search algorithms are not used: they turn Optuna's pruners off (optuna issue 3100).
    """

    name = "Ray"

    def __init__(self, address: str, table: WorkersTable) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("Ray is not installed\n  cure: pip install 'dspace[ray]', here and on every node") from None
        self.ray, self.table, self.own = ray, table, not ray.is_initialized()
        try:
            _knock(address)
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).split("\n")[0]
            raise UserError(
                f"no Ray cluster answers at {address!r}: {first}\n"
                "  cure: `ray start --head` on one machine, `ray start --address HEAD:6379` on the others, --ray auto"
            ) from None
        self._check_room()
        options: dict[str, Any] = {"num_cpus": table.cpus, "num_gpus": table.gpus, "max_retries": 0}
        # The function travels by value: a node needs dspace for the worker's process only, which has its own path.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.task: Any = ray.remote(**options)(run_command)

    def _check_room(self) -> None:
        room = self.ray.cluster_resources()
        for what, wanted in (("CPU", self.table.cpus), ("GPU", self.table.gpus)):
            if wanted > room.get(what, 0):
                raise UserError(
                    f"a worker wants {wanted} {what}, the Ray cluster has {room.get(what, 0):g}\n"
                    f"  cure: [workers] {what.lower()}s = ... in the study file"
                )

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> Handle:
        return _RayTask(self.ray, self.task.remote(command, environment, int(self.table.cpus)), log)

    def close(self) -> None:
        if self.own:
            self.ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


class _SlurmJob(Handle):
    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log, self.words = job, log, ""

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        if error is not None:
            self.words = f"the job {self.job.job_id} ended: {type(error).__name__}: {str(error)[:2000]}"
            return KILLED
        code, self.words = self.job.result()
        return code

    def ask_to_stop(self) -> None:
        self.job.cancel()

    def kill(self) -> None:
        self.job.cancel()

    def last_words(self) -> str:
        return self.words


class Slurm(Placement):
    """Jobs submitted through submitit; ``cluster = "local"`` runs them as processes of this machine, for a trial."""

    name = "Slurm"

    def __init__(self, cluster: str, table: WorkersTable, folder: Path) -> None:
        try:
            import cloudpickle
            import submitit
        except ImportError:
            raise UserError("submitit is not installed\n  cure: pip install 'dspace[slurm]'") from None
        self.table = table
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as with Ray
        try:
            self.executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
            settings: dict[str, Any] = {"timeout_min": 24 * 60, "cpus_per_task": max(int(table.cpus), 1)}
            if table.gpus:
                settings["gpus_per_node"] = max(round(table.gpus), 1)
            self.executor.update_parameters(**(settings | table.slurm))
        except (RuntimeError, NameError, ValueError, TypeError) as error:
            raise UserError(
                f"Slurm cannot be used as the study file says: {error}\n  cure: [workers.slurm] in the study file"
            ) from None

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> Handle:
        job = self.executor.submit(run_command, command, environment, int(self.table.cpus))
        return _SlurmJob(job, log)


def worker_command(arguments: list[str]) -> list[str]:
    """The command line of a worker with these arguments."""
    return [sys.executable, "-m", "dspace.study.worker", *arguments]

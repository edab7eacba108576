"""The shares of a merge of files, started here or on a cluster, watched, and started again where they died."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

from suture.core.extras import check_installed
from suture.core.progress import bar
from suture.errors import ConfigError, OutputError, SutureError, unknown_name
from suture.storage.cache import cache_directory

LauncherName = Literal["local", "slurm", "ray"]
_REFUSED = (2, 130)  # exit codes of what another try would not mend
_TRIES = 4
_MOST_SHARES = 4096
_PAUSE = 0.2  # seconds between looks


class End(NamedTuple):
    """The end of a share: its exit code, None if it was lost with its machine, and its last line of errors."""

    code: int | None
    line: str = ""


class Running(Protocol):
    """A share that was started."""

    def end(self) -> End | None:
        """Its end; None while it runs."""
        ...

    def stop(self) -> None:
        """Stop it."""
        ...


class Launcher(Protocol):
    """A place where commands are run."""

    def start(self, command: Sequence[str]) -> Running:
        """Start a command."""
        ...


@dataclass(frozen=True)
class Shares:
    """A merge that was done in shares; `restarts` counts the shares that died and were started again."""

    shards: int
    restarts: int


def launch_shares(
    arguments: Sequence[str], *, shards: int, launcher: LauncherName | Launcher = "local", pause: float = _PAUSE
) -> Shares:
    """Do a merge of files in shares, each a process: `arguments` are the words that follow `suture merge`.

    `launcher` is local (processes of this machine), slurm (jobs through submitit) or ray (tasks). Every share writes
    into one folder, which all machines must see, and the last one publishes the result, whose bytes are those of one
    process. A share that dies is started again, at most three times, and resumes. Raises `SutureError` with
    the line of the first share that is refused; then the others are stopped.
    """
    if not isinstance(shards, int) or isinstance(shards, bool) or not 1 <= shards <= _MOST_SHARES:
        raise ConfigError(f"shards={shards!r}: wanted a whole number from 1 to {_MOST_SHARES}.")
    if taken := [word for word in arguments if word.partition("=")[0] in ("shard", "plan", "--plan", "--shard")]:
        raise ConfigError(f"{taken[0]} with a launcher, which gives each process its share. Remedy: leave it out.")
    place = _launcher(launcher) if isinstance(launcher, str) else launcher
    if launcher == "local" and not any(word.startswith("threads=") for word in arguments):
        arguments = [*arguments, f"threads={max(1, (os.cpu_count() or 1) // shards)}"]
    commands = [
        [sys.executable, "-m", "suture", "merge", *arguments, f"shard={i}/{shards}", "--quiet"]
        for i in range(1, shards + 1)
    ]
    restarts = _Watch(place, commands, pause).until_done()
    return Shares(shards, restarts)


class _Watch:
    def __init__(self, launcher: Launcher, commands: Sequence[Sequence[str]], pause: float):
        self.launcher, self.commands, self.pause = launcher, commands, pause
        self.tries = [0] * len(commands)
        self.running: dict[int, Running] = {}

    def until_done(self) -> int:
        """Watch until every share is done; returns how many were started again."""
        try:
            for i in range(len(self.commands)):
                self._start(i)
            with bar("merging shares", len(self.commands)) as advance:
                while self.running:
                    time.sleep(self.pause)
                    advance(sum(self._is_done(i) for i in list(self.running)))
        except BaseException:
            for share in self.running.values():
                share.stop()
            raise
        return sum(self.tries) - len(self.commands)

    def _start(self, i: int) -> None:
        self.tries[i] += 1
        self.running[i] = self.launcher.start(self.commands[i])

    def _is_done(self, i: int) -> bool:
        end = self.running[i].end()
        if end is None:
            return False
        del self.running[i]
        if end.code == 0:
            return True
        share = f"Share {i + 1}/{len(self.commands)}"
        if end.code in _REFUSED:
            raise SutureError(end.line.removeprefix("suture: ") or f"{share} was stopped.")
        if self.tries[i] == _TRIES:
            what = "was lost" if end.code is None else f"ended with code {end.code}"
            remedy = "Remedy: see to that; the same command goes on where it stopped"
            raise OutputError(f"{share} {what} {_TRIES} times: {end.line or 'it says nothing'} {remedy}.")
        self._start(i)
        return False


def _launcher(name: str) -> Launcher:
    if name not in get_args(LauncherName):
        raise ConfigError(unknown_name("launcher", name, get_args(LauncherName)))
    if name == "local":
        return LocalLauncher()
    return SubmititLauncher("slurm") if name == "slurm" else RayLauncher()


class LocalLauncher:
    """Processes of this machine."""

    def start(self, command: Sequence[str]) -> "LocalProcess":
        """Start a process whose errors are kept."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        return LocalProcess(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors), errors)


@dataclass
class LocalProcess:
    """A process of this machine."""

    process: subprocess.Popen[bytes]
    errors: Any

    def end(self) -> End | None:
        """Its end, once it has ended."""
        code = self.process.poll()
        if code is None:
            return None
        self.errors.seek(0)
        with self.errors as file:
            return End(code, _last_line(file.read()))

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        self.errors.close()


class SubmititLauncher:
    """Jobs through submitit, on Slurm or, with `cluster="local"`, on this machine.

    Options of Slurm are those of sbatch's environment: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT.
    """

    def __init__(self, cluster: str, folder: Path | None = None):
        check_installed(f"launcher={cluster}", "submitit", ["submitit"])
        import submitit  # type: ignore[import-not-found]

        logs = folder or cache_directory() / "submitit"
        self.executor = submitit.AutoExecutor(folder=str(logs), cluster=cluster)
        self.executor.update_parameters(name="suture-merge", timeout_min=24 * 60)

    def start(self, command: Sequence[str]) -> "SubmittedJob":
        """Submit a job."""
        return SubmittedJob(self.executor.submit(run_share, list(command)))


@dataclass
class SubmittedJob:
    """A job of submitit."""

    job: Any

    def end(self) -> End | None:
        """Its end, once it has ended."""
        if not self.job.done():
            return None
        try:
            return End(*self.job.result())
        except Exception as error:  # submitit's errors for a job that left no result
            return End(None, _last_line(str(error).encode()))

    def stop(self) -> None:
        """Cancel the job."""
        self.job.cancel()


class RayLauncher:
    """Tasks of Ray: of the cluster that RAY_ADDRESS names, or of this machine."""

    def __init__(self):
        check_installed("launcher=ray", "ray", ["ray"])
        import ray  # type: ignore[import-not-found]

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        self.task = ray.remote(max_retries=0)(run_share)

    def start(self, command: Sequence[str]) -> "RayTask":
        """Start a task."""
        return RayTask(self.task.remote(list(command)))


@dataclass
class RayTask:
    """A task of Ray."""

    reference: Any

    def end(self) -> End | None:
        """Its end, once it has ended."""
        import ray  # type: ignore[import-not-found]

        done, _ = ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return End(*ray.get(self.reference))
        except Exception as error:  # the worker died, or its machine
            return End(None, _last_line(str(error).encode()))

    def stop(self) -> None:
        """Cancel the task."""
        import ray  # type: ignore[import-not-found]

        ray.cancel(self.reference, force=True)


def run_share(command: Sequence[str]) -> tuple[int, str]:
    """Run a share on the machine where it was sent; returns its exit code and its last line of errors."""
    command = [sys.executable, *command[1:]]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode, _last_line(done.stderr)


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""

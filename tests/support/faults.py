"""A process that is killed at an exact event: the n-th write, allocation, sync, rename or swap of files.

`strike` wraps the calls by which suture changes a disk. With `lose` the kill is a power cut: whatever was written and
not yet synced is zero afterwards. As a program it runs the command line, struck or counting:

    python faults.py KIND NUMBER suture's arguments …
    python faults.py count 0 suture's arguments …
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

KINDS = {
    "write": ("pwrite", "write"),
    "allocate": ("posix_fallocate",),
    "sync": ("fsync",),
    "rename": ("replace", "rename"),
}


class Events:
    """Counts events of each kind, and ends the process before the `number`-th of one kind."""

    def __init__(self, kind="", number=0, lose=False):
        self.kind, self.number, self.lose = kind, number, lose
        self.counts = Counter()
        self.unsynced = {}  # (device, inode) → {(start, stop), …}

    def happens(self, kind):
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.number:
            if self.lose:
                self.lose_what_was_not_synced()
            os.kill(os.getpid(), signal.SIGKILL)

    def lose_what_was_not_synced(self):
        for path in Path(".").absolute().rglob("*"):
            state = path.lstat()
            for start, stop in self.unsynced.get((state.st_dev, state.st_ino), ()):
                with path.open("r+b") as file:
                    file.seek(start)
                    file.write(bytes(max(0, min(stop, state.st_size) - start)))


def strike(events):
    """Let every change of the disk by this process go through `events` first."""
    from suture.storage import atomic

    for kind, names in KINDS.items():
        for name in names:
            setattr(os, name, _counted(events, kind, name, getattr(os, name)))
    atomic._exchange = _counted(events, "swap", "exchange", atomic._exchange)


def _counted(events, kind, name, original):
    def call(*arguments, **options):
        events.happens(kind)
        result = original(*arguments, **options)
        if name == "pwrite":
            state, start = os.fstat(arguments[0]), arguments[2]
            written = events.unsynced.setdefault((state.st_dev, state.st_ino), set())
            written.add((start, start + result))
        if name == "fsync":
            state = os.fstat(arguments[0])
            events.unsynced.pop((state.st_dev, state.st_ino), None)
        return result

    return call


def in_a_fork(function, events):
    """Run `function()` in a child process, struck by `events`; returns (whether it was killed, its counts)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write = os.write
            strike(events)
            function()
            write(writing, json.dumps(events.counts).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        counts = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the child ended with {status}"
    return status == signal.SIGKILL, json.loads(counts) if counts else {}


def command_line(arguments, folder, kind, number):
    """The command line in a process of its own, killed at an event; what `subprocess.run` gives."""
    import torch

    threads = str(torch.get_num_threads())  # another number of threads rounds differently
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, kind, str(number), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def main():
    kind, number, *arguments = sys.argv[1:]
    from suture.cli.main import main as suture
    from suture.storage.resume import Resume

    Resume.due = lambda self: True  # a state after every step
    events = Events(kind, int(number))
    strike(events)
    code = suture(arguments)
    if kind == "count":
        print(json.dumps(events.counts))
    sys.exit(code)


if __name__ == "__main__":
    main()

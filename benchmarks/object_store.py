"""A merge from and to S3 against plain reads and writes of the same objects: python benchmarks/object_store.py [MB]

Three models of so many MB (64) lie in moto's S3 server, a process of this machine. Every figure is of a process that
has merged tiny models before, so that starting Python and loading libraries is in none of them. Seconds are the wall's,
processor seconds those of this side alone; requests are those for ranges that reached the server. The memory is
anonymous memory at its peak, above that of the merge of tiny models. The bytes are compared with those of a merge of
local files.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = """
import sys
from object_store import serving
with serving() as store:
    print(store.address, flush=True)
    for line in sys.stdin:
        print(len(store.ranges), flush=True)
"""
NAMES, MEMORY = ("base", "one", "two"), "200MB"


def write_models(folder: Path, megabytes: float) -> None:
    import torch

    from suture import save_checkpoint

    rows = max(1, int(megabytes * 1e6 / 4 / 8 / 1024))
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        tensors = {f"layer.{i}.weight": torch.randn(rows, 1024) for i in range(8)}
        save_checkpoint(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")


def words(root: str, output: str) -> list[str]:
    models = [f"base={root}/base", *(f"models.{name}={root}/{name}" for name in NAMES[1:])]
    return ["merge", *models, "method=ties_merging", f"output={output}", f"memory={MEMORY}", "threads=1", "--quiet"]


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(arguments: list[str]) -> tuple[float, float, int]:
    """Seconds, processor seconds and the peak of anonymous memory of a merge in this process."""
    from suture.cli.main import main as merge

    peak, done = [anonymous()], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    began, used = time.perf_counter(), time.process_time()
    assert merge(arguments) == 0
    figures = time.perf_counter() - began, time.process_time() - used
    done.set()
    thread.join()
    return *figures, peak[0]


def merged(root: str, output: str, tiny: str) -> list[float]:
    """The figures of a merge in a new process, after one of the `tiny` models: seconds, processor seconds, memory."""
    lists = [words(tiny, f"{output}-tiny"), words(root, output)]
    command = [sys.executable, __file__, "--merge", json.dumps(lists)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def plain(system, bucket: str, folder: Path, times: int) -> tuple[float, float]:
    """Seconds and processor seconds of reading the inputs so many times, and of writing the output."""
    began, used = time.perf_counter(), time.process_time()
    for _ in range(times):
        for name in NAMES:
            system.cat_file(f"{bucket}/{name}/model.safetensors")
    system.put_file(str(folder / "local" / "model.safetensors"), f"{bucket}/plain/model.safetensors")
    return time.perf_counter() - began, time.process_time() - used


def main() -> None:
    if sys.argv[1:2] == ["--merge"]:
        (_, _, before), (seconds, used, peak) = map(measured, json.loads(sys.argv[2]))
        print(json.dumps([seconds, used, peak - before]))
        return
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 64
    environment = {"PYTHONPATH": f"{ROOT}/tests/support:{os.environ.get('PYTHONPATH', '')}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes, env=os.environ | environment, text=True)
    try:
        assert server.stdout is not None
        assert server.stdin is not None
        os.environ |= {"AWS_ENDPOINT_URL": server.stdout.readline().strip(), "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}

        def requests() -> int:
            print(file=server.stdin, flush=True)
            return int(server.stdout.readline())

        import s3fs

        system = s3fs.S3FileSystem()
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["SUTURE_CACHE"] = f"{temporary}/cache"
            for bucket, size in (("tiny", 0.1), ("large", megabytes)):
                write_models(Path(temporary) / bucket, size)
                system.mkdir(bucket)
                system.put(f"{temporary}/{bucket}/", f"{bucket}/", recursive=True)
            folder, before = Path(temporary) / "large", requests()
            seconds, used, memory = merged("s3://large", "s3://large/merged", "s3://tiny")
            count = requests() - before
            local, local_used, _ = merged(str(folder), str(folder / "local"), f"{temporary}/tiny")
            stored = system.cat_file("large/merged/model.safetensors")
            assert stored == (folder / "local" / "model.safetensors").read_bytes()
            plain(system, "tiny", folder, 1)
            read, read_used = plain(system, "large", folder, 3)
            print(f"three models of {megabytes:.0f} MB by TIES, which reads three times; bytes as of a local merge")
            print(f"merge from and to S3      {seconds:6.1f} s, {used:5.1f} processor seconds, {count} requests")
            print(f"  memory above tiny ones  {memory / 1e6:6.0f} MB of memory={MEMORY}")
            print(f"plain reads and a write   {read:6.1f} s, {read_used:5.1f} processor seconds")
            print(f"merge of local files      {local:6.1f} s, {local_used:5.1f} processor seconds")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()

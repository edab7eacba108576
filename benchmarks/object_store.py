"""A merge from and to S3 against plain reads and writes of the same objects: python benchmarks/object_store.py [MB]

Three models of so many MB (64) lie in moto's S3 server, a process of this machine. Seconds are the wall's, processor
seconds those of this side alone. The memory is the anonymous memory of the merging process at its peak, above that of
the same merge of tiny models. The bytes are compared with those of a merge of local files.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = """
import time
from object_store import serving
with serving() as store:
    print(store.address, flush=True)
    time.sleep(900)
"""
MERGE = "import sys; from suture.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
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


def merged(root: str, output: str) -> tuple[float, float, int]:
    """Seconds, processor seconds, and the peak of anonymous memory of a merge."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-c", MERGE, *words(root, output)])
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        except OSError:
            pass
        time.sleep(0.01)
    assert process.returncode == 0
    times = os.times()
    return time.perf_counter() - began, times.children_user + times.children_system, peak


def plain(system, bucket: str, folder: Path, times: int) -> tuple[float, float]:
    """Seconds and processor seconds of reading the inputs so many times, and of writing the output."""
    began, used = time.perf_counter(), time.process_time()
    for _ in range(times):
        for name in NAMES:
            system.cat_file(f"{bucket}/{name}/model.safetensors")
    system.put_file(str(folder / "local" / "model.safetensors"), f"{bucket}/plain/model.safetensors")
    return time.perf_counter() - began, time.process_time() - used


def main() -> None:
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 64
    environment = {"PYTHONPATH": f"{ROOT}/tests/support:{os.environ.get('PYTHONPATH', '')}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes, env=os.environ | environment)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().decode().strip()
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        import s3fs

        system = s3fs.S3FileSystem()
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["SUTURE_CACHE"] = f"{temporary}/cache"
            peaks = []
            for bucket, size in (("tiny", 0.1), ("large", megabytes)):
                folder = Path(temporary) / bucket
                write_models(folder, size)
                system.mkdir(bucket)
                system.put(f"{folder}/", f"{bucket}/", recursive=True)
                before = os.times()
                seconds, used, peak = merged(f"s3://{bucket}", f"s3://{bucket}/merged")
                used -= before.children_user + before.children_system
                peaks.append(peak)
            local = merged(str(folder), str(folder / "local"))[0]
            stored = system.cat_file("large/merged/model.safetensors")
            assert stored == (folder / "local" / "model.safetensors").read_bytes()
            read, read_used = plain(system, "large", folder, 2)
            print(
                f"three models of {megabytes:.0f} MB by TIES, which reads twice; the bytes are those of a local merge"
            )
            print(f"merge from and to S3      {seconds:6.1f} s, {used:5.1f} processor seconds")
            print(f"  memory above tiny ones  {(peaks[1] - peaks[0]) / 1e6:6.0f} MB of memory={MEMORY}")
            print(f"plain reads and a write   {read:6.1f} s, {read_used:5.1f} processor seconds")
            print(f"merge of local files      {local:6.1f} s")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()

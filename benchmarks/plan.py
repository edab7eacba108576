"""Planned seconds against those that a job then takes: python benchmarks/plan.py

Run it on a machine that does nothing else. Slopes are measured anew.
"""

import os
import tempfile
import time

POOLS = ["modelpool=glyphs8", "taskpool=glyphs8"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SUTURE_CACHE"] = os.path.join(folder, "cache")
        import suture

        suture.evaluate_pool(POOLS)  # decodes the inputs, which no plan counts
        own = [f"output={folder}/run", "repair.router=none", f"repair.cache_dir={folder}"]
        learned = [f"output={folder}/learned", "method.max_steps=50", f"method.cache_dir={folder}"]
        jobs = {
            "evaluate": (POOLS, "evaluate", suture.evaluate_pool),
            "ties_merging, final": (["method=ties_merging", *POOLS, "repair=final", *own], "run", suture.run),
            "adamerging": (["method=adamerging", *POOLS, *learned], "run", suture.run),
        }
        print(f"{'job':<22}{'planned':>9}{'took':>9}{'ratio':>8}")
        for name, (words, verb, job) in jobs.items():
            planned = suture.plan(words, verb=verb).seconds
            began = time.perf_counter()
            job(words)
            took = time.perf_counter() - began
            print(f"{name:<22}{planned:>8.1f}s{took:>8.1f}s{planned / took:>8.2f}", flush=True)


if __name__ == "__main__":
    main()

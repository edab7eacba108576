"""A sweep over λ on the shipped models, then one page of all its runs: python sweep.py [fast_dev_run=true]"""

import sys
from pathlib import Path

from suture.cli.main import main
from suture.reporting import report

words = ["method=task_arithmetic", "method.scaling_factor=0.1,0.2,0.3", "modelpool=glyphs8", "taskpool=glyphs8"]
if main(["-m", *words, "hydra.sweep.dir=sweep", *sys.argv[1:]]) == 0:
    runs = sorted(path.parent for path in Path("sweep").glob("*/report.json"))
    print(f"The runs side by side are in {report(runs, 'sweep/comparison.html')}")

"""A sweep over λ on the models that ship, then one page of all its runs: python sweep.py [fast_dev_run=true]"""

import sys

import suture

runs = []
for value in (0.1, 0.2, 0.3):
    config = ["method=task_arithmetic", f"method.scaling_factor={value}", "modelpool=glyphs8", "taskpool=glyphs8"]
    runs.append(suture.run([*config, f"output=sweep/{value}", "reuse=true", *sys.argv[1:]]).folder)
page = suture.report(runs, "sweep/comparison.html")
print(f"The runs side by side are in {page}")

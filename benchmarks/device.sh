#!/bin/sh
# All tests and benchmarks of an accelerator in one call: sh benchmarks/device.sh [PYTHON]
# The tests run on a stand-in where there is none; the benchmarks need one.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
"$python" -m pytest -q -m device
"$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU; the benchmarks were not run'"
"$python" benchmarks/adamerging.py --device cuda --steps 20 --repeats 3 --measure time operators
"$python" benchmarks/merge.py --only "suture ties_merging" "ties, device=cuda"
"$python" benchmarks/merge_files.py --device cuda

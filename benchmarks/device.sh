#!/bin/sh
# All tests and benchmarks of an accelerator in one call: sh benchmarks/device.sh [PYTHON]
# The tests run on a stand-in where there is none; the benchmarks need one. A benchmark that fails does not stop the others.
set -u
cd "$(dirname "$0")/.."
python=${1:-python}
failed=""
run() { echo "== $*"; "$python" "$@" || failed="$failed
$*"; }
run -m pytest -q -m device
"$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU; the benchmarks were not run'" || exit 1
run benchmarks/adamerging.py --device cuda --steps 20 --repeats 3 --measure time
run benchmarks/surgery.py --device cuda --inputs 256 --measured 60
run benchmarks/surgery.py --device cuda --inputs 256 --measured 60 --precision bf16-mixed
run benchmarks/merge.py --only "suture ties_merging" "ties, device=cuda"
run benchmarks/merge_files.py --device cuda
run benchmarks/published_shape.py --device cuda --images 200 --steps 20
run benchmarks/adamerging.py --scale 0.1 --measure operators
run benchmarks/surgery.py --inputs 16 --operators
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }

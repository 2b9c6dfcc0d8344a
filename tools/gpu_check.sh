#!/bin/sh
# What ten minutes with a GPU must answer: parity, plain decoding against its floor, the costs of verification, and SMART
# against its rivals at published acceptance. Needs torch, Triton and numpy, and this tree; no network, nothing is
# installed. Options, e.g. --json FILE and --tiny, and what PASS means: benchmarks/smart_lab/gpu_check.py.
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$here/src:$here/benchmarks${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m smart_lab.gpu_check "$@"
code=$?
case $code in
0 | 3) ;;
*) echo "GPU_CHECK FAIL plain/floor=- smart/eagle2@=- smart/pooled_chain@=- knee=- why=exit code $code" ;;
esac
exit $code

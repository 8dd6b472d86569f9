#!/usr/bin/env bash
# Builds, runs and judges TensorRT engines on a machine with an NVIDIA GPU: the int8 engine of a checkpoint against the
# portable graph in ONNX Runtime (numbers) and against a float16 engine of the same graph (speed).
#
#   pip install 'dmq-export[calibrate,tensorrt]'
#   scripts/verify_tensorrt.sh CHECKPOINT [FOLDER] [BATCH]
#
# FOLDER keeps graphs, plans and the timing cache (default: a temporary one); BATCH is that of both engines (default 2,
# which is that of the inputs a checkpoint keeps to verify with). Exit 0: the verdict is good; 1: it is not; 2: usage.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 3 ]]; then
  sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
checkpoint=$1
batch=${3:-2}
if [[ -n ${2:-} ]]; then
  folder=$2
  mkdir -p "$folder"
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
helper=$here/bench/trt_verdict.py
python=${PYTHON:-python3}

step() { printf '\n== %s\n' "$*"; }
run() {
  printf '+ %s\n' "$*"
  "$@"
}

step "machine"
run nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
run dmq-export --version
run "$python" -c 'import tensorrt, polygraphy; print("TensorRT", tensorrt.__version__, "Polygraphy", polygraphy.__version__)'

step "graphs"
run dmq-export onnx "$checkpoint" -o "$folder/portable.onnx"
run dmq-export onnx "$checkpoint" -o "$folder/int8.onnx" --target tensorrt --dtype float16
run dmq-export lint "$folder/int8.onnx"
run "$python" "$helper" unquantize "$folder/int8.onnx" "$folder/float16.onnx"
shapes=$("$python" "$helper" shapes "$folder/int8.onnx" "$batch")

step "engines"
for name in int8 float16; do
  run dmq-export trt-build "$folder/$name.onnx" -o "$folder/$name.plan" --shapes "$shapes" \
    --timing-cache "$folder/timing.cache" --optimization-level 4
  run dmq-export inspect "$folder/$name.plan"
done

step "verdict"
run "$python" "$helper" verdict "$checkpoint" "$folder"

#!/usr/bin/env bash
# Builds, runs and judges engines on a machine with an NVIDIA GPU: the int8 engine of a checkpoint against the portable
# graph in ONNX Runtime (numbers) and against an engine of the plain float16 network (speed).
#
#   pip install 'dmq-export[calibrate,tensorrt]'       # or, for a GeForce or RTX GPU, [calibrate,tensorrt-rtx]
#   scripts/verify_tensorrt.sh [--runtime tensorrt|tensorrt-rtx] CHECKPOINT [FOLDER] [BATCH]
#
# FOLDER keeps graphs, plans and caches (default: a temporary one); BATCH is that of both engines (default 2, which is
# that of the inputs a checkpoint keeps to verify with). Exit 0: the verdict is good; 1: it is not; 2: usage.
set -euo pipefail

usage() {
  sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

runtime=tensorrt
if [[ ${1:-} == --runtime ]]; then
  runtime=${2:-}
  shift $(($# < 2 ? $# : 2))
fi
[[ $runtime == tensorrt || $runtime == tensorrt-rtx ]] || usage
[[ $# -ge 1 && $# -le 3 ]] || usage

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
run nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
run dmq-export --version
run dmq-export doctor

step "graphs"
run dmq-export onnx "$checkpoint" -o "$folder/portable.onnx"
run dmq-export onnx "$checkpoint" -o "$folder/int8.onnx" --target tensorrt --dtype float16
run dmq-export lint "$folder/int8.onnx"
run "$python" "$helper" float16 "$folder/int8.onnx" "$folder/float16.onnx"
shapes=$("$python" "$helper" shapes "$folder/int8.onnx" "$batch")

step "engines"
if [[ $runtime == tensorrt-rtx ]]; then
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  settings=(--compute-capability "$capability")
else
  settings=(--timing-cache "$folder/timing.cache" --optimization-level 4)
fi
for name in int8 float16; do
  run dmq-export trt-build "$folder/$name.onnx" -o "$folder/$name.plan" --runtime "$runtime" --shapes "$shapes" \
    "${settings[@]}"
  run dmq-export inspect "$folder/$name.plan"
done

step "speed"
rm -f "$folder"/*.rtx-cache
contestants=("$runtime:$folder/float16.plan" "$runtime:$folder/int8.plan")
if [[ $runtime == tensorrt-rtx ]]; then
  # a first run compiles the kernels and keeps them beside the plans: the columns "load s" and "warm-up s" fall
  run dmq-export bench "${contestants[@]}" --batch "$batch" --repeat 5
  if "$python" -c 'import onnxruntime_ep_nv_tensorrt_rtx' 2>/dev/null; then
    contestants+=("onnxruntime-tensorrt-rtx:$folder/int8.onnx")
  fi
fi
run dmq-export bench "${contestants[@]}" --batch "$batch"

step "verdict"
run "$python" "$helper" verdict "$checkpoint" "$folder"

#!/usr/bin/env bash
# Speed and memory of the 12B model on one 80 GB GPU beside a PyTorch peer: benchmarks/gpu.sh [PART ...] [FLAGS]
# (`--help`: parts and flags). Each part takes at most ten minutes and writes benchmarks/results/gpu_PART.json, or to $OUT.
# Needs jax, flax, optax and torch, and nothing else that a machine with them would lack; what is missing is named, with
# the wheels to carry. PYTHON is the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${OUT:-benchmarks/results}
parts=() flags=()
for word in "$@"; do
    case $word in step | lora | qlora | fused | unfused) parts+=("$word") ;; *) flags+=("$word") ;; esac
done
[ ${#parts[@]} -gt 0 ] || parts=(step lora qlora fused unfused)
failed=0
for part in "${parts[@]}"; do
    "${PYTHON:-python3}" -m benchmarks.gpu "$part" --json "$results/gpu_$part.json" ${flags[@]+"${flags[@]}"} || failed=1
done
exit $failed

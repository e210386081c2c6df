#!/usr/bin/env bash
# The full counts: the demo at three seeds and all tests in full, each Python with its jax. Any length.
# Results go to benchmarks/results/. PYTHONS names the versions; one that is not installed is reported as such.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=benchmarks/results
mkdir -p "$results"
failed=0

for seed in 0 1 2; do
    make demo SEED=$seed DEMO_DIR="runs/seed$seed" || failed=1
    cp "runs/seed$seed/report.json" "$results/demo_seed$seed.json"
done

.venv/bin/acejax bench stages --json "$results/stages.json" || failed=1
.venv/bin/acejax bench lora --json "$results/lora.json" || failed=1
.venv/bin/acejax bench rounding --json "$results/rounding.json" || failed=1
.venv/bin/acejax bench plan --json "$results/plan.json" || failed=1
.venv/bin/acejax bench startup --json "$results/startup.json" || failed=1
if make aot; then
    .venv-aot/bin/acejax bench tpu --against "${AGAINST:-c143ae5}" || failed=1
else
    failed=1
fi

for pair in ${PYTHONS:-3.11:0.10 3.12:0.11 3.13:0.12}; do
    python=python${pair%:*} jax=${pair#*:}
    if ! "$python" --version >/dev/null 2>&1; then  # a version manager may have the name without the version
        echo "$python is not installed: jax $jax not tested"
        failed=1
        continue
    fi
    make test COUNTS=full PYTHON="$python" VENV=".venv-$python" JAX="jax==$jax.*" \
        PYTEST_FLAGS="--junitxml=$results/tests-$python-jax$jax.xml" || failed=1
done
exit $failed

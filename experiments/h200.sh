#!/usr/bin/env bash
# Every measurement that needs a GPU, in one go: about 25 minutes on one H200.
#
#   OUT=/where/results/go experiments/h200.sh          on the GPU machine, from the repository root
#   OUT=/tmp/out experiments/h200.sh --dry-run         the same steps with tiny sizes, on a CPU, in the present Python
#
# The machine needs no network: the git-ignored folder carried/ holds wheels (carried/wheels: jem_jax's dependencies,
# jax[cuda13], torch) and CIFAR-10 (carried/data: TFDS's prepared cifar10). Results are experiments/results/*.json, the
# run's report and logs, all under $OUT. A step that fails says so and leaves the others; the exit status counts them.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:?set OUT to the folder that gets the results}
mkdir -p "$OUT/experiments"
failed=0

step() { # step NAME SECONDS COMMAND...: runs a command with a limit, its output in $OUT/NAME.log
  local name=$1 seconds=$2
  shift 2
  echo "== $name: $*"
  if timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1; then
    tail -n 3 "$OUT/$name.log"
  else
    echo "== $name failed (status $?):"
    tail -n 15 "$OUT/$name.log"
    failed=$((failed + 1))
  fi
  cp -r experiments/results "$OUT/experiments/"
}

if [ "${1:-}" = --dry-run ]; then
  python=${PYTHON:-python}
  step benchmark 300 "$python" experiments/benchmark.py --preset=tiny --rounds=2
  step agreement 300 "$python" experiments/bfloat16_agreement.py --config=digits --iterations=3 --seeds=2 --store=bfloat16_agreement_tiny \
    --config.sampler.num_steps=2
  step scaling 300 "$python" experiments/scaling.py --preset=tiny
  step fast 300 "$python" -m jem_jax.main --config=cifar10_fast --workdir="$OUT/cifar10_fast" --config.data.name=digits \
    --config.data.pad=1 --config.model.depth=10 --config.model.width=1 --config.sampler.num_steps=1 \
    --config.training.epochs=1 --config.evaluation.sections=classification
else
  python3 -m venv /tmp/jem_jax_venv
  python=/tmp/jem_jax_venv/bin/python
  step install 300 "$python" -m pip install --no-index --find-links carried/wheels -e ".[cuda13,torch]"
  data="--config.data.data_dir=carried/data"
  step benchmark 590 "$python" experiments/benchmark.py --preset=gpu
  step agreement 300 "$python" experiments/bfloat16_agreement.py --config=cifar10 --iterations=100 "$data"
  step scaling 200 "$python" experiments/scaling.py --preset=gpu
  step fast 600 "$python" -m jem_jax.main --config=cifar10_fast --workdir="$OUT/cifar10_fast" "$data"
fi
exit "$failed"

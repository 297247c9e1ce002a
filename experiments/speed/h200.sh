#!/usr/bin/env bash
# Every measurement that needs a GPU, the most important first: at most 45 minutes, by the limits of its steps.
#
#   OUT=/where/results/go experiments/speed/h200.sh             on the GPU machine, from the repository root
#   OUT=/where/results/go experiments/speed/h200.sh fast scaling      some of the steps, in that order
#   OUT=/tmp/out experiments/speed/h200.sh --dry-run            the same steps with tiny sizes, on a CPU, in the present Python
#
# Steps: benchmark profile fast agreement levers levers_rest scaling; CASES=1 leaves the benchmark its first case alone,
# which takes three minutes on an H200, as fast takes five, agreement two and a half, and levers three. Results are experiments/results/*.json, written after every
# case, the run's report and logs; all are copied to $OUT while a step goes on, so that nothing is lost where the machine
# is taken away. A step that fails says so and leaves the others; the exit status counts them. Where calls of the machine
# are shorter than that, start it with setsid in one and fetch $OUT in the next.
#
# The machine needs no network. The git-ignored folder carried/ holds CIFAR-10 as carried/cifar10.npz (docs/pages/run.md:
# images and labels, test_images and test_labels), and in carried/wheels what its Python lacks of jem_jax's
# dependencies (tensorflow-datasets is not needed); a Python with jax for CUDA and torch is expected, and left as it is:
# jem_jax and these go to $SITE.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:?set OUT to the folder that gets the results}
SITE=${SITE:-/tmp/jem_jax_site}
python=${PYTHON:-python3}
mkdir -p "$OUT/experiments"
failed=0

collect() {
  cp -r experiments/results docs/pages/images "$OUT/experiments/"
}

step() { # step NAME SECONDS COMMAND...: runs a command with a limit, its output in $OUT/NAME.log
  local name=$1 seconds=$2 status
  shift 2
  echo "== $name: $*"
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1 &
  local running=$!
  while kill -0 "$running" 2>/dev/null; do
    sleep 1
    collect
  done
  wait "$running"
  status=$?
  collect
  if [ "$status" = 0 ]; then
    tail -n 5 "$OUT/$name.log"
  else
    echo "== $name failed (status $status):"
    tail -n 15 "$OUT/$name.log"
    failed=$((failed + 1))
  fi
}

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
all=(benchmark profile fast agreement levers levers_rest scaling)
steps=("$@")
[ "${#steps[@]}" -gt 0 ] || steps=("${all[@]}")
for name in "${steps[@]}"; do
  if [[ " ${all[*]} " != *" $name "* ]]; then
    echo "h200.sh: there is no step $name; steps are ${all[*]}" >&2
    exit 2
  fi
done

if [ -z "$dry" ]; then
  # As a wheel lays it out, without the build that some machines are too old for.
  mkdir -p "$SITE"
  cp -rT jem_jax "$SITE/jem_jax"
  cp -rT configs "$SITE/jem_jax/configs"
  shopt -s nullglob
  wheels=(carried/wheels/*.whl)
  if [ "${#wheels[@]}" -gt 0 ]; then
    step install 120 "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "${wheels[@]}"
  fi
  # Without PYTHONSAFEPATH the checkout's jem_jax, which has no configs, would come first.
  export PYTHONSAFEPATH=1 PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}"
  # Every process but the benchmark's finds what an earlier one compiled and tuned.
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/jem_jax_cache}
fi
data=--config.data.name=carried/cifar10.npz
export PYTHONUNBUFFERED=1

for name in "${steps[@]}"; do
  case "$name${dry:+ dry}" in
    benchmark) step benchmark 590 "$python" -m experiments.speed.benchmark --preset=gpu --profile --patience=150 ${CASES:+--cases="$CASES"} ;;
    profile) step profile 240 "$python" -m experiments.speed.profile_step --preset=gpu ;;
    fast) step fast 600 "$python" -m jem_jax.main --config=configs/cifar10_fast.py --workdir="$OUT/cifar10_fast" "$data" ;;
    agreement) step agreement 300 "$python" -m experiments.checks.bfloat16_agreement --config=cifar10 --iterations=100 "$data" ;;
    levers) step levers 300 "$python" -m experiments.speed.levers --preset=gpu ;;
    levers_rest) step levers_rest 300 "$python" -m experiments.speed.levers --preset=gpu_rest ;;
    scaling) step scaling 240 "$python" -m experiments.speed.scaling --preset=gpu ;;
    "benchmark dry") step benchmark 300 "$python" -m experiments.speed.benchmark --preset=tiny --rounds=2 ;;
    "profile dry") step profile 300 "$python" -m experiments.speed.profile_step --preset=tiny ;;
    "fast dry")
      step fast 300 "$python" -m jem_jax.main --config=configs/cifar10_fast.py --workdir="$OUT/cifar10_fast" \
        --config.data.name=digits --config.data.pad=1 --config.model.depth=10 --config.model.width=1 \
        --config.sampler.num_steps=1 --config.training.epochs=1 --config.evaluation.sections=classification
      ;;
    "agreement dry")
      step agreement 300 "$python" -m experiments.checks.bfloat16_agreement --config=digits --iterations=3 --seeds=2 \
        --store=bfloat16_agreement_tiny --config.sampler.num_steps=2
      ;;
    "levers dry") step levers 300 "$python" -m experiments.speed.levers --preset=tiny ;;
    "levers_rest dry") step levers_rest 300 "$python" -m experiments.speed.levers --preset=tiny ;;
    "scaling dry") step scaling 300 "$python" -m experiments.speed.scaling --preset=tiny ;;
  esac
done
exit "$failed"

#!/usr/bin/env bash
# What only an NVIDIA GPU can show, in under ten minutes: benchmarks of the kernels and of whole models, then the tests.
#
#   eval/gpu.sh FOLDER [NAME ...]   # CSVs and logs go into FOLDER; torch, triton, transformers, typer, pydantic are needed
#                                   # with names: these of the runs below only
set -uo pipefail
out=${1:?usage: eval/gpu.sh FOLDER [NAME ...]}
only=" ${*:2} "
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=.:kernels:eval:tests PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}

run() { # seconds, name, command
  [[ $only == "  " || $only == *" $2 "* ]] || return 0
  echo "== $2 ($(date +%T))"
  timeout "$1" "${@:3}" 2>&1 | tee -a "$out/log.txt" | tail -n 60
}
kernels="$python -m tokenprune_kernels.bench"
bench="$python -m tokenprune bench --csv $out/bench.csv"

run 40 dual_gram_entropy $kernels --op dual_gram_entropy --shapes 576x32x128 2880x32x128 1024x28x128 --csv "$out/dual_gram_entropy_gpu.csv"
run 15 growth $kernels --op dual_gram_entropy --growth --csv "$out/growth_gpu.csv"
run 30 kv_compact $kernels --op kv_compact --csv "$out/kv_compact_gpu.csv"
# The default method first; then one row each of the others where launches decide (batch 1, 576 tokens).
run 70 llava-1.5-7b $bench --geometry llava-1.5-7b --batch 1 --batch 8 --batch 8r --repeats 7 --answer 32
for method in entropyprune fastv uniform; do
  run 25 "$method" $bench --geometry llava-1.5-7b --method $method --layer 2 --keep 192 --batch 1 --repeats 7 --answer 0
done
run 45 llava-next-7b $bench --geometry llava-next-7b --batch 8 --repeats 3 --answer 32
run 40 qwen2.5-vl-7b $bench --geometry qwen2.5-vl-7b --batch 1 --repeats 3 --answer 32
steps="$python -m tokenprune_eval.studies.steps --csv $out/steps_gpu.csv"
run 60 static_steps $steps --geometry llava-1.5-7b --layers 16 --batch 1 --cache static
run 60 static_steps_batch_8 $steps --geometry llava-next-7b --layers 16 --batch 8 --cache static --rounds 2 --tokens 32
run 40 growing_steps $steps --geometry llava-1.5-7b --batch 1 --cache growing
run 40 token_sets $python -m tokenprune_eval.studies.token_sets --csv "$out/token_sets_gpu.csv"
run 90 tests $python -m pytest -q -n 8 -p no:randomly tests/test_gpu.py tests/kernels

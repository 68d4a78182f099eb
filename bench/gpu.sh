#!/usr/bin/env bash
# Everything a GPU should say, from a bare checkout, most important first; a cut-off loses only what comes after it.
#
#   OUT=results bash bench/gpu.sh
#
# Needs torch, triton, transformers, peft, pytest and hypothesis; installs nothing. Each part is bounded in time and
# writes its own log, and its CSV as it goes. On a machine without a GPU it runs the same parts on the CPU, tiny.
set -u
: "${OUT:?set OUT to a folder for the results}"
mkdir -p "$OUT"
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=kernels:.:tests HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

part() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    printf '%-22s %4d s  %s\n' "$name" $((SECONDS - started)) "$([ "$status" = 0 ] && echo ok || echo "FAILED ($status)")" |
        tee -a "$OUT/summary.txt"
}

: >"$OUT/summary.txt"
part env 60 python -m surgery env
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,driver_version --format=csv >"$OUT/gpu.csv"
    shape=(--model smollm2-135m --lengths "512,1024,2048")
    large=(--model llama3.2-1b --lengths "1024,4096")
else
    shape=(--model tiny --lengths 64)
    large=(--model tiny --lengths 128)
fi
# the kernels against fp64 autograd; the regulariser's gate against eager maps is the first thing of every step part
part tests_triton 150 python -m pytest -q -n 0 tests/ops/test_triton.py tests/ops/test_triton_columns.py
part step_small 120 python -m bench.train_step "${shape[@]}" --dtype bf16-autocast --train full,lora \
    --csv "$OUT/train_step.csv"
part step_large 150 python -m bench.train_step "${large[@]}" --dtype bf16-autocast --train lora \
    --methods plain,plain_same_tokens,surgery,paper --csv "$OUT/train_step.csv"
echo
cat "$OUT/summary.txt"
for name in step_small step_large; do
    sed -n '/^targets/,$p' "$OUT/$name.log"
done

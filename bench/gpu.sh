#!/usr/bin/env bash
# Everything a GPU should say, from a bare checkout, most important first; a cut-off loses only what comes after it.
#
#   OUT=results bash bench/gpu.sh
#
# OUT gets run.csv, memory.csv, train_step.csv, choice.csv (rows are added as they are measured), targets.txt (written anew after
# every part), summary.txt (how each part ended) and log.txt (the output of all of them).
#
#   PEERS           folder of wheels (flash-attn-4 and what it needs, fa3-fwd, flash-colsum), installed elsewhere
#   SECONDS_IN_ALL  every part ends before this many seconds have passed (default: 570)
#   BENCH_COMMIT    what the commit column says where there is no git
#   PYTHON          default: python3
#
# Needs torch, triton, transformers, peft, pytest, pytest-xdist and hypothesis; downloads nothing. Without a GPU the
# same parts run on the CPU, tiny, so that the script itself is tested.
set -u
: "${OUT:?set OUT to a folder for the results}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=kernels:.:tests${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
budget=${SECONDS_IN_ALL:-570}
tests="not run"
: >"$OUT/summary.txt"
: >"$OUT/log.txt"

say() { echo "$*" | tee -a "$OUT/summary.txt"; }

# part NAME LIMIT COMMAND...: sets `ended` to ok, FAILED (status), cut off or skipped
part() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) started=$SECONDS status
    shift 2
    if [ "$left" -lt 5 ]; then
        ended="skipped, no time left"
    else
        printf '\n==== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
        timeout -k 5 "$((limit < left ? limit : left))" "$@" >>"$OUT/log.txt" 2>&1
        status=$?
        case $status in
        0) ended=ok ;;
        124 | 137) ended="cut off" ;;
        *) ended="FAILED ($status)" ;;
        esac
    fi
    say "$(printf '%-16s %4d s  %s' "$name" $((SECONDS - started)) "$ended")"
}

targets() {
    "$python" -m bench.targets --run "$OUT/run.csv" --memory "$OUT/memory.csv" --train-step "$OUT/train_step.csv" \
        --tests "$tests" >"$OUT/targets.txt" 2>>"$OUT/log.txt"
}

if [ -n "${PEERS:-}" ]; then
    site=$(mktemp -d)
    part peers 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$PEERS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$site
fi
part environment 40 "$python" -m surgery env

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv >>"$OUT/log.txt"
    test_command=("$python" -m pytest -q -n 8 tests/ops/test_gpu.py tests/ops/test_triton.py
        tests/ops/test_triton_columns.py tests/ops/test_vendor.py tests/ops/test_epilogue.py)
    run=("$python" -m bench.run --tokens 16k --seconds 4 --csv "$OUT/run.csv")
    # telling ones first, should the part be cut off
    lengths=1k,8k,2k,16k,512,4k
    dims=(llama3-8b llama3.2-1b)
    ours=ours_triton,ours_triton_off
    free=sdpa_cudnn,sdpa_flash
    peers=ours_triton,ours_fa4,ours_cudnn,ours_flash,flex,fa4,fa3_fwd,sdpa_efficient,vaug_flash,vaug_cudnn,vaug_efficient,eager,paper
    memory=(--shapes llama3-8b --lengths "1k,2k,4k,8k,16k,32k" --budget 80 --impls "$ours,sdpa_flash,eager,paper")
    columns=(--shapes llama3.2-1b --kinds "causal,full" --lengths 4k --tokens 4k)
    large=(--model llama3.2-1b --lengths 2048 --methods "plain,surgery,paper")
    small=(--model smollm2-135m --lengths 1024 --methods "plain,plain_same_tokens,surgery,paper")
else
    # what a collection proves: every test the GPU would run is there and imports
    test_command=("$python" -m pytest -q -n 0 --collect-only tests/ops/test_triton.py tests/ops/test_triton_columns.py)
    run=("$python" -m bench.run --dtype float32 --tokens 256 --repetitions 2 --csv "$OUT/run.csv")
    lengths=64,128
    dims=(tiny)
    ours=ours_cpu,ours_cpu_off
    free=sdpa
    peers=ours_cpu,vaug,eager,paper,flex,fa4
    memory=(--shapes tiny --dtype float32 --lengths "64,128,256,512" --budget 1 --impls "$ours,eager,paper")
    columns=(--shapes tiny --dtype float32 --lengths 64 --tokens 64)
    large=(--model tiny --lengths 64 --steps 1 --methods "plain,surgery")
    small=()
fi

part tests 160 "${test_command[@]}"
tests=$ended
targets
# the price of the statistic and the plain kernels beside it, then the peers, the larger head dim first
for shape in "${dims[@]}"; do
    part "on_off_$shape" 60 "${run[@]}" --shapes "$shape" --lengths "$lengths" --impls "$ours,$free"
done
targets
cat "$OUT/targets.txt"
for shape in "${dims[@]}"; do
    part "peers_$shape" 110 "${run[@]}" --shapes "$shape" --lengths "$lengths" --impls "$peers"
    targets
done
cat "$OUT/targets.txt"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # torch's cache would hide what lies beyond a tensor's end; the self-check is the same kernels once more
        part "$tool" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 SURGERY_SELF_CHECK=0 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" tests/ops/gpu_sanitizer.py
    done
else
    say "memcheck, racecheck: not run, compute-sanitizer is not there"
fi
if [ ${#small[@]} -gt 0 ]; then
    part epilogue 30 "$python" -m bench.epilogue --bandwidth
    part choice 60 "$python" -m bench.choice --repetitions 5 --csv "$OUT/choice.csv"
fi
part memory 50 "$python" -m bench.memory "${memory[@]}" --csv "$OUT/memory.csv"
part columns 40 "$python" -m bench.run --task column_mass "${columns[@]}" --csv "$OUT/run.csv"
step=("$python" -m bench.train_step --dtype bf16-autocast --train lora --csv "$OUT/train_step.csv")
part step_large 90 "${step[@]}" "${large[@]}"
[ ${#small[@]} -gt 0 ] && part step_small 90 "${step[@]}" "${small[@]}"
targets
echo
cat "$OUT/targets.txt" "$OUT/summary.txt"

#!/usr/bin/env bash
# Every CPU result of bench/results/cpu that bench makes. On two cores the times take about ten minutes and need a quiet
# machine; memory, which comes after them, does not.
#
#   bash bench/cpu.sh                   all parts: run train_step memory
#   bash bench/cpu.sh memory            some of them
#
# A part replaces its CSV. Then commit the CSVs and run `python -m bench.plot`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=kernels:.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python3}
results=${RESULTS:-bench/results/cpu}
lengths=${LENGTHS:-256,512,1k,2k,4k}
shape=${SHAPE:-smollm2-135m}
model=${MODEL:-smollm2-135m}
step_lengths=${STEP_LENGTHS:-1024}
memory_lengths=${MEMORY_LENGTHS:-1024,2048}
[ $# -gt 0 ] || set -- run train_step memory

for part in "$@"; do
    started=$SECONDS
    rm -f "$results/$part.csv"
    case $part in
    run)
        for dtype in bfloat16 float32; do
            "$python" -m bench.run --shapes "$shape" --lengths "$lengths" --dtype "$dtype" --csv "$results/run.csv"
        done
        ;;
    memory)
        "$python" -m bench.memory --shapes "$shape" --lengths "$lengths" --dtype float32 --budget 16 \
            --impls ours_cpu,ours_cpu_off,sdpa,vaug,eager,paper --csv "$results/memory.csv"
        ;;
    train_step)
        step=("$python" -m bench.train_step --model "$model" --dtype bf16-autocast --csv "$results/train_step.csv")
        "${step[@]}" --measure time --batch 1 --pairs 2 --accumulation 1 --lengths "$step_lengths" --steps 3 \
            --train lora,full
        memory=("${step[@]}" --measure memory --methods "plain,surgery,paper")
        "${memory[@]}" --lengths "$memory_lengths" --train full,lora
        "${memory[@]}" --lengths "${memory_lengths##*,}" --train full --checkpointing on
        ;;
    *)
        echo "unknown part $part; known: run, train_step, memory" >&2
        exit 2
        ;;
    esac
    echo "$part: $((SECONDS - started)) s"
done

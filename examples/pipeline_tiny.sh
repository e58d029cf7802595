#!/usr/bin/env bash
# Every stage of training at the small scale, on a plain CPU: simulated scenes, SFT, CoT SFT, three kinds of GRPO, students,
# location tokens against digits, and the table of them all. Hours on two cores. A finished stage is kept and a killed one
# goes on, so run it again until it is through:
#
#     examples/pipeline_tiny.sh                 # writes runs/tiny/* and bench/results/stages.json
#     SCALE=100 OUT=runs/try SAVE=runs/try/stages.json examples/pipeline_tiny.sh     # a hundredth of the steps, to see it work
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/tiny}                  # where the stages' checkpoints go
SCALE=${SCALE:-1}                      # divides the numbers of steps, scenes and questions
DATA=${DATA:-data/world}               # where scenes are rendered to
START=${START:-checkpoints/tabletop}   # from random weights (train.small_model) the first stage needs three times the steps
SAVE=${SAVE:-bench/results/stages.json}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=passive         # threads that wait by spinning take the time of those that work

part() { echo $(($1 / SCALE > 2 ? $1 / SCALE : 2)); }

# stage NAME MODULE ARGUMENTS: runs it unless its folder is there already.
stage() {
    local name=$1 module=$2
    shift 2
    if [ -d "$OUT/$name" ]; then
        echo "== $name: done before"
    else
        echo "== $name"
        "$PYTHON" -m "$module" "$@"
    fi
}

mkdir -p "$OUT"
"$PYTHON" -m train.world.render "$DATA/train" --scenes "$(part 12000)"

# The decoder's dense head is dropped after each stage; while it is there it says where to look (train/dense_head.py).
sft=(--data "$DATA/train" --dense-weight 0.3 --muon)
stage stage1 train.sft --model "$START" --out "$OUT/stage1" --steps "$(part 4000)" "${sft[@]}"
stage stage2 train.sft --model "$OUT/stage1" --out "$OUT/stage2" --steps "$(part 2500)" --cot-share 0.35 "${sft[@]}"

# GRPO as GeM-VG is thought to have done it (half the groups reason), and its two ablations.
[ -f "$OUT/rl.jsonl" ] || "$PYTHON" -m train.world.records "$DATA/train" "$OUT/rl.jsonl" --count "$(part 4000)" --seed 1
groups=${RL_BATCH:-16}
grpo=(--model "$OUT/stage2" --data "$OUT/rl.jsonl" --steps "$(part 200)" --batch "$groups" --generations 8
    --device-batch $((groups * 8)) --learning-rate 2e-5 --beta 0 --max-new-tokens 160 --save-steps 20)
stage grpo train.grpo --out "$OUT/grpo" --cot-share 0.5 "${grpo[@]}"
stage grpo-direct train.grpo --out "$OUT/grpo-direct" --cot-share 0 "${grpo[@]}"
stage grpo-cot train.grpo --out "$OUT/grpo-cot" --cot-share 1 "${grpo[@]}"

# A student of half the parameters, from every other layer of its teacher.
stage cut train.student "$OUT/grpo" "$OUT/cut" --decoder-layers 5 --vision-layers 2 --intermediate 320
stage student train.distill --teacher "$OUT/grpo" --model "$OUT/cut" --out "$OUT/student" --steps "$(part 3000)" "${sft[@]}"

# The same student answering in digits: what location tokens are worth.
stage cut-digits train.vocabulary "$OUT/student" "$OUT/cut-digits" --digits
stage student-digits train.sft --model "$OUT/cut-digits" --out "$OUT/student-digits" --steps "$(part 3000)" "${sft[@]}"

"$PYTHON" -m bench.stages "$OUT" stage1 stage2 grpo grpo-direct grpo-cot student student-digits:direct \
    --data "$DATA" --limit "$(part 1000)" --save "$SAVE"

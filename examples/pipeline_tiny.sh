#!/usr/bin/env bash
# Every stage of training at the small scale, on a plain CPU, from random weights to a bundle: simulated scenes, SFT, CoT
# SFT and GPTQ; then GRPO beside as much SFT, students, location tokens against digits, and the tables of them all. Hours
# on two cores. A finished stage is kept and a killed one goes on, so run it again until it is through:
#
#     examples/pipeline_tiny.sh                 # writes runs/tiny/* and bench/results/{stages,further}.json
#     UNTIL=bundle examples/pipeline_tiny.sh    # ends with runs/tiny/bundles/int4, a bundle as the one that ships
#     START=checkpoints/tabletop examples/pipeline_tiny.sh     # goes on from the shipped model, without tower and words
#     SCALE=100 OUT=runs/try SAVE=runs/try/stages.json examples/pipeline_tiny.sh     # a hundredth of the steps, to see it work
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-runs/tiny}                  # where the stages' checkpoints go
SCALE=${SCALE:-1}                      # divides the numbers of steps, scenes and questions
DATA=${DATA:-data/world}               # where scenes are rendered to
START=${START:-}                       # a checkpoint to go on from; without one, random weights
SEEDS=${SEEDS:-1 2 3}                  # of GRPO and of the SFT that it is set against
UNTIL=${UNTIL:-}                       # `bundle` ends it with the quantised bundle
SAVE=${SAVE:-bench/results/stages.json}
PYTHON=${PYTHON:-.venv/bin/python}
[ -z "$UNTIL" ] || [ "$UNTIL" = bundle ] || { echo "$0: UNTIL is bundle or nothing, not $UNTIL" >&2; exit 2; }
. examples/need_workshop.sh

part() { echo $(($1 / SCALE > 2 ? $1 / SCALE : 2)); }

# stage NAME MODULE ARGUMENTS: runs it unless its checkpoint is there already. config.json comes last into a folder.
stage() {
    local name=$1 module=$2
    shift 2
    if [ -f "$OUT/$name/config.json" ]; then
        echo "== $name: done before"
    else
        echo "== $name"
        "$PYTHON" -m "$module" "$@"
    fi
}

mkdir -p "$OUT"
"$PYTHON" -m train.world.render "$DATA/train" --scenes "$(part 6000)"

# The decoder's dense head is dropped after each stage; while it is there it says where to look (train/world/dense_head.py).
sft=(--data "$DATA/train" --batch "${SFT_BATCH:-8}" --warmup-steps 30 --decay-share 0.5 --dense-weight 0.3 --muon \
    --attention math)
if [ -z "$START" ]; then
    START=$OUT/start
    stage start train.small_model "$START" --seed 1
    # The tower first: alone it sees several times the pictures a second, and the decoder then finds names and colours to
    # point at.
    stage tower train.sft --model "$START" --out "$OUT/tower" --steps "$(part 5000)" --seed 19 "${sft[@]}" --tower-only \
        --questions 1 --learning-rate 2.5e-3 --decay-share 0.25
    # Then the words of a question and what they mean, in one picture: among all kinds of questions these are too few.
    stage words train.sft --model "$OUT/tower" --out "$OUT/words" --steps "$(part 500)" --seed 21 "${sft[@]}" --one-picture \
        --decay-share 0
    # The rate falls over two thirds of the steps: at a constant one the losses come to stand still long before the end.
    START=$OUT/words
    first=(--steps "$(part 14000)" --batch "${SFT_BATCH:-4}" --decay-share 0.67)
else
    first=(--steps "$(part 1500)")
fi
stage stage1 train.sft --model "$START" --out "$OUT/stage1" --seed 20 "${sft[@]}" "${first[@]}"
# Half of the reasoning's loss is a long listing; its conclusion decides, so it counts three times. A third of the
# reasoning is the conclusion alone.
stage stage2 train.sft --model "$OUT/stage1" --out "$OUT/stage2" --steps "$(part 7000)" --seed 22 --cot-share 0.3 \
    --brief-share 0.3 --conclusion-weight 3 "${sft[@]}" --batch "${SFT_BATCH:-4}" --decay-share 0.99

# As what ships (examples/ship_tiny.sh): stage 2, its decoder in int4 by GPTQ, the rest in int8.
stage int4 quantize.gptq --model "$OUT/stage2" --out "$OUT/int4" --group-size 32 --vision-bits 8 --head-bits 8 \
    --embedding-bits 8 --scenes "$DATA/calibration" --samples "$(part 128)"
"$PYTHON" -m export.to_onnx "$OUT/int4" "$OUT/bundles/int4" --overwrite
[ "$UNTIL" != bundle ] || exit 0

# A student of half the parameters. It keeps the vision tower and most of the decoder's layers and gives up channels of
# its MLPs: those are learned again within minutes, where half the layers lose how pictures are compared.
stage cut train.student "$OUT/stage2" "$OUT/cut" --decoder-layers 8 --vision-layers 4 --intermediate 104
distill=(train.distill --teacher "$OUT/stage2" "${sft[@]}")
stage student-first "${distill[@]}" --model "$OUT/cut" --out "$OUT/student-first" --steps "$(part 1500)" --seed 23
stage student "${distill[@]}" --model "$OUT/student-first" --out "$OUT/student" --steps "$(part 700)" --seed 25 \
    --decay-share 0.7

# And stage 2 without the marks around its boxes, which are two of a box's six tokens.
stage unmarked train.vocabulary "$OUT/stage2" "$OUT/unmarked" --bare-boxes
stage bare train.sft --model "$OUT/unmarked" --out "$OUT/bare" --steps "$(part 480)" --seed 27 "${sft[@]}" \
    --learning-rate 8e-4 --decay-share 0.75 --warmup-steps 15

# The first student answering in digits: what location tokens are worth.
stage cut-digits train.vocabulary "$OUT/student-first" "$OUT/cut-digits" --digits
stage student-digits train.sft --model "$OUT/cut-digits" --out "$OUT/student-digits" --steps "$(part 900)" --seed 24 \
    "${sft[@]}"

# Hybrid GRPO (groups that reason and groups that do not) beside as much further SFT on the very same records. Both start
# from a model that reasons briefly: a conclusion with its boxes, without a listing. More groups reason than answer directly,
# as there is more to gain. The questions are about scenes that SFT has not seen and cannot know by heart. Temperature 0.5
# is ours, and no other was compared with it: near the likeliest answer groups should differ in what they choose, less in
# a box's last digits.
stage cold-start train.sft --model "$OUT/stage2" --out "$OUT/cold-start" --steps "$(part 2400)" --seed 41 --cot-share 0.6 \
    --brief-share 1 --conclusion-weight 3 "${sft[@]}" --batch "${SFT_BATCH:-4}" --learning-rate 6e-4 --decay-share 0.95 \
    --warmup-steps 15
"$PYTHON" -m train.world.render "$DATA/rl" --scenes "$(part 2500)" --first-seed 12000
[ -f "$OUT/rl.jsonl" ] || "$PYTHON" -m train.world.records "$DATA/rl" "$OUT/rl.jsonl" --count "$(part 6000)" --seed 1 \
    --cot-share 0.7 --brief-share 1
groups=${RL_BATCH:-32}
for seed in $SEEDS; do
    stage "grpo-$seed" train.grpo --model "$OUT/cold-start" --data "$OUT/rl.jsonl" --out "$OUT/grpo-$seed" \
        --steps "$(part 150)" --batch "$groups" --generations 8 --device-batch $((groups * 8)) --cot-share 0.7 \
        --lora-rank 8 --learning-rate 1e-3 --schedule linear --beta 0 --temperature 0.5 --min-spread 0.05 \
        --reward-scale batch --max-new-tokens 128 --save-steps 20 --seed "$seed"
    stage "more-sft-$seed" train.sft --model "$OUT/cold-start" --data "$OUT/rl.jsonl" --out "$OUT/more-sft-$seed" \
        --steps "$(part 150)" --batch "$groups" --lora-rank 8 --learning-rate 1e-3 --warmup-steps 2 --decay-share 1 \
        --conclusion-weight 3 --seed "$seed"
done
# Most of what a seed moves is chance; their mean loses it.
means=()
if [ "$(wc -w <<< "$SEEDS")" -gt 1 ]; then
    for arm in grpo more-sft; do
        of=()
        for seed in $SEEDS; do of+=("$OUT/$arm-$seed"); done
        stage "$arm-mean" train.average "${of[@]}" --out "$OUT/$arm-mean"
        means+=("$arm-mean")
    done
fi

"$PYTHON" -m bench.stages "$OUT" stage1:direct:held-out stage2 student:direct bare:direct:held-out \
    student-digits:direct:held-out \
    --data "$DATA" --splits ${SPLITS:-held-out new-names new-light checkers photographs new-style more-cameras} \
    --limit "$(part 1000)" --save "$SAVE"
# What GRPO gained over its start and over as much SFT, and whether reasoned answers are worth their time.
"$PYTHON" -m bench.further "$OUT" cold-start grpo more-sft "${means[@]}" --seeds $SEEDS --data "$DATA" --limit "$(part 2000)" \
    --save "$(dirname "$SAVE")/further.json"

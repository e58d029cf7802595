#!/usr/bin/env bash
# Qwen2-VL on your own labelled pictures with one GPU of 24 GB: from the photographs to a bundle for a device.
#
#     MODEL=Qwen2-VL-7B-Instruct PICTURES=shop OUT=runs/shop examples/lora_24gb.sh                 # adapters on a 7B in 4 bits
#     MODEL=Qwen2-VL-2B-Instruct METHOD=full PICTURES=shop OUT=runs/shop examples/lora_24gb.sh     # a 2B's own weights
#
# Not yet run on hardware. What has run is every command below with a two-layer model on a CPU, without the 4 bits (the
# tests do). Run again after a kill it goes on. That it fits is arithmetic: a 7B is 5 GB in 4 bits beside 3.5 GB of vision
# tower, embeddings and head in bfloat16; a 2B trained whole is 2.2 billion weights, gradients and two moments in bfloat16,
# 18 GB. Each leaves 6 GB or more for a row of activations, which --checkpointing computes twice.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:?folder or hub id of a Qwen2-VL}
PICTURES=${PICTURES:?folder of labelled pictures, laid out as docs/tutorials/train.md says}
OUT=${OUT:?folder for all that is written}
KIND=${KIND:-coco}                     # how they are labelled: coco, voc, labelme
METHOD=${METHOD:-qlora}                # qlora: adapters on 4 bits; lora: adapters; full: all but the vision tower
STEPS=${STEPS:-1000}
ACCUMULATE=${ACCUMULATE:-16}           # records a step, one at a time
WARMUP=${WARMUP:-30}
MAX_PIXELS=${MAX_PIXELS:-401408}       # of a picture: UniVG-R1 and Vision-R1
GROUP=${GROUP:-128}                    # weights that share a scale: GPTQ's own
SAMPLES=${SAMPLES:-128}                # prompts to calibrate on: GPTQ's own
PYTHON=${PYTHON:-.venv/bin/python}
. examples/need_workshop.sh

# Rank and rate of the adapters: QLoRA's for a 7B is 2e-4 at rank 64; half of it at rank 16 is ours, as all of `full` is.
case $METHOD in
    qlora) how=(--load-in-4bit --dtype bfloat16 --lora-rank 16 --learning-rate 1e-4) ;;
    lora) how=(--dtype bfloat16 --lora-rank 16 --learning-rate 1e-4) ;;
    full) how=(--dtype bfloat16 --learning-rate 1e-5) ;;
    *) echo "$0: METHOD is qlora, lora or full, not $METHOD" >&2; exit 2 ;;
esac

mkdir -p "$OUT"
[ -f "$OUT/records.jsonl" ] || "$PYTHON" -m train.data.convert "$KIND" "$PICTURES" --out "$OUT/records.jsonl"
[ -f "$OUT/sheet.html" ] || "$PYTHON" -m train.data.inspect "$OUT/records.jsonl" --sheet "$OUT/sheet.html"
[ -f "$OUT/trained/config.json" ] || "$PYTHON" -m train.sft --model "$MODEL" --data "$OUT/records.jsonl" \
    --out "$OUT/trained" --steps "$STEPS" --batch 1 --accumulate "$ACCUMULATE" --schedule cosine --warmup-steps "$WARMUP" \
    --weight-decay 0 --freeze-vision --checkpointing --max-pixels "$MAX_PIXELS" --max-length 6000 --save-steps 100 "${how[@]}"
[ -f "$OUT/gptq/config.json" ] || "$PYTHON" -m quantize.gptq --model "$OUT/trained" --out "$OUT/gptq" \
    --records "$OUT/records.jsonl" --samples "$SAMPLES" --group-size "$GROUP" --vision-bits 8 --head-bits 8 --embedding-bits 8
[ -f "$OUT/bundle/manifest.json" ] || "$PYTHON" -m export.to_onnx "$OUT/gptq" "$OUT/bundle"
"$PYTHON" -m export.verify "$OUT/bundle" --against "$OUT/gptq"
echo "$OUT/bundle is ready: gemvg ground PICTURE... --bundle $OUT/bundle --query 'every ...'"

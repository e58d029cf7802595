#!/usr/bin/env bash
# The commands of docs/tutorials/train.md, from an empty folder on: pictures with labels become a model.
#
#     examples/jobs/train.sh FOLDER                                        # ten minutes on two cores
#     SCENES=8 HELD_OUT=2 RECORDS=8 STEPS=2 BATCH=2 WARMUP=1 examples/jobs/train.sh FOLDER    # small, to see it work
#
# Needs the workshop (`make workshop`), with `gemvg` and `python` on the path.
set -euo pipefail
GEMVG=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"

gemvg train world.render rendered --scenes "${SCENES:-150}" --first-seed 500000
python "$GEMVG"/examples/own_pictures.py rendered shop --held-out "${HELD_OUT:-30}"

gemvg train data.convert coco shop/train --out shop.jsonl
gemvg train data.convert coco shop/held-out --out held-out.jsonl

gemvg train data.inspect shop.jsonl --sheet shop.png

gemvg train world.records rendered tabletop.jsonl --count "${RECORDS:-200}"
gemvg train data.mix mix.jsonl shop.jsonl tabletop.jsonl

gemvg train sft --model "$GEMVG"/checkpoints/tabletop --data mix.jsonl --out mine \
    --steps "${STEPS:-300}" --batch "${BATCH:-8}" --warmup-steps "${WARMUP:-20}" --muon

gemvg bench accuracy --records held-out.jsonl --model "$GEMVG"/checkpoints/tabletop mine

gemvg export to_onnx mine mine.bundle --weights int8
gemvg ground $(ls shop/held-out/train2017/*-0.png | head -2) --bundle mine.bundle --query "every beaker" --draw found.png

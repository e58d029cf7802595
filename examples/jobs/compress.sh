#!/usr/bin/env bash
# The commands of docs/tutorials/compress.md, from an empty folder on: a checkpoint becomes an int4 bundle.
#
#     examples/jobs/compress.sh FOLDER                                     # minutes on two cores
#     SAMPLES=4 QUESTIONS=10 examples/jobs/compress.sh FOLDER              # small, to see it work
#
# Needs the workshop (`make workshop`), with `gemvg` on the path.
set -euo pipefail
GEMVG=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"

gemvg quantize gptq --model "$GEMVG"/checkpoints/tabletop --out tabletop.gptq --group-size 32 \
    --vision-bits 8 --head-bits 8 --embedding-bits 8 --samples "${SAMPLES:-128}" --scenes calibration

gemvg export to_onnx tabletop.gptq tabletop.int4

gemvg export verify tabletop.int4 --against tabletop.gptq

gemvg bench accuracy --model "$GEMVG"/checkpoints/tabletop tabletop.int4 --limit "${QUESTIONS:-500}" --data questions

gemvg inspect tabletop.int4
gemvg ground "$GEMVG"/examples/images/scene1-a.png "$GEMVG"/examples/images/scene1-b.png \
    --bundle tabletop.int4 --query "all balls"

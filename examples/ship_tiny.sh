#!/usr/bin/env bash
# From the small pipeline's last stage to what this repository ships: checkpoints/tabletop, gemvg_edge/models/tabletop with
# what its scores mean, and every table about them (bench/results, docs). It comes after
# `UNTIL=bundle examples/pipeline_tiny.sh`, in a clone that has its history; look at `git diff` afterwards.
#
#     examples/ship_tiny.sh                        # takes runs/tiny/stage2
#     examples/ship_tiny.sh runs/other/stage2
set -euo pipefail
cd "$(dirname "$0")/.."

FROM=${1:-runs/tiny/stage2}
OUT=${OUT:-runs/ship}                  # what the tables are made of
DATA=${DATA:-data/world}               # where scenes are rendered to
PYTHON=${PYTHON:-.venv/bin/python}
. examples/need_workshop.sh
RESULTS=bench/results BUNDLE=gemvg_edge/models/tabletop
run() { echo "== $*"; "$PYTHON" -m "$@"; }

mkdir -p "$OUT/stages"
ln -sfn "$(realpath "$FROM")" "$OUT/stages/stage2"
run bench.stages "$OUT/stages" stage2::held-out --data "$DATA" --limit 1000

# The checkpoint. What it calls familiar are plain tables: by those four numbers a photograph's pattern on a table is not to
# be told from a photograph.
run train.familiar "$FROM" "$OUT/told" --data "$DATA/held-out" --pictures 4 --overwrite
run train.rewrite "$OUT/told" checkpoints/tabletop --dtype float16 --overwrite

# The bundles; one beside the shipped one has no scores' meaning in it.
run quantize.gptq --model checkpoints/tabletop --out "$OUT/tabletop.gptq" --group-size 32 --vision-bits 8 --head-bits 8 \
    --embedding-bits 8 --scenes "$DATA/calibration" --overwrite
run export.to_onnx "$OUT/tabletop.gptq" "$OUT/tabletop.int4" --overwrite
run export.to_onnx checkpoints/tabletop "$OUT/tabletop.float32" --overwrite
run export.to_onnx "$OUT/tabletop.gptq" $BUNDLE --overwrite    # its folder's name is what it is called
run bench.calibration --limit 2000 --data "$DATA" --write --save $RESULTS/calibration.json

ask=(bench.accuracy --data "$DATA" --overwrite)
both=("$OUT/tabletop.float32" "$OUT/tabletop.int4")
run "${ask[@]}" --model checkpoints/tabletop "${both[@]}" --limit 500 --out "$OUT/500" --save $RESULTS/accuracy.json
run "${ask[@]}" --model "${both[@]}" --task tabletop:new-names --limit 1000 --out "$OUT/1000" \
    --save $RESULTS/accuracy_new_names.json
rm $RESULTS/accuracy_new_names.png     # no page shows it
run "${ask[@]}" --model "${both[@]}" --limit 2000 --out "$OUT/2000"
run bench.compare "$OUT"/2000/tabletop.{float32,int4}.tabletop.jsonl --save $RESULTS/compare_int4.json
run bench.constrained --limit 2000 --data "$DATA" --save $RESULTS/constrained.json
run bench.pruning --data "$DATA" --save $RESULTS/pruning.json

# Every split, beside what shipped before: `before` knew plain tables alone, `several-runs` came from a row of runs.
for old in before:426dac5 several-runs:292b791; do
    mkdir -p "$OUT/stages/${old%:*}"
    git archive "${old#*:}" checkpoints/tabletop | tar -x --strip-components 2 -C "$OUT/stages/${old%:*}"
done
ln -sfn "$(realpath checkpoints/tabletop)" "$OUT/stages/tabletop"
ln -sfn "$(realpath "$OUT/tabletop.gptq")" "$OUT/stages/tabletop.int4"
run bench.stages "$OUT/stages" before:direct:{held-out,new-light,checkers,photographs} several-runs:direct tabletop:direct \
    tabletop.int4:direct several-runs:cot:held-out tabletop:cot:held-out --data "$DATA" --save $RESULTS/worlds.json \
    --splits held-out new-light checkers photographs new-style more-cameras new-names
if [ -d /usr/share/sweethome3d/furniture ]; then
    run bench.stages "$OUT/stages" tabletop:direct --data "$DATA" --splits held-out furnished --save $RESULTS/furnished.json
else
    echo "no /usr/share/sweethome3d/furniture (Debian's sweethome3d-furniture): $RESULTS/furnished.json stays as it is" >&2
fi

"$PYTHON" examples/demo.py examples/demo.png
run bench.readme

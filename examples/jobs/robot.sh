#!/usr/bin/env bash
# The commands of docs/tutorials/robot.md, from an empty folder on:
#
#     examples/jobs/robot.sh FOLDER
#
# Needs the runtime alone, with `gemvg` and `python` on the path.
set -euo pipefail
GEMVG=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"

cp "$GEMVG"/examples/images/scene1-a.png left.png
cp "$GEMVG"/examples/images/scene1-b.png right.png

gemvg ground left.png right.png --query "all balls" --query "the black mug"

python "$GEMVG"/examples/robot.py left.png right.png --ask "all balls" --ask "the red mug" --rounds "${ROUNDS:-3}"

#!/usr/bin/env bash
# The commands of docs/tutorials/service.md, from an empty folder on: a service is started, asked and ended.
#
#     examples/jobs/service.sh FOLDER
#     PORT=8099 examples/jobs/service.sh FOLDER                            # where 8000 is taken
#
# Needs the runtime with the extra `serve`, its `gemvg` and `python` on the path, and curl.
set -euo pipefail
GEMVG=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

cp "$GEMVG"/examples/images/scene1-a.png left.png
cp "$GEMVG"/examples/images/scene1-b.png right.png

gemvg serve --port "${PORT:-8000}" &
curl --silent --retry 40 --retry-connrefused --retry-delay 1 http://127.0.0.1:"${PORT:-8000}"/readyz

curl --silent -F image=@left.png -F image=@right.png -F query="all balls" -F query="the red mug" \
    http://127.0.0.1:"${PORT:-8000}"/v1/ground > answer.json
python -m json.tool answer.json

curl --silent -F image=@left.png -F image=@right.png http://127.0.0.1:"${PORT:-8000}"/v1/scenes > scene.json
SCENE=$(python -c "import json; print(json.load(open('scene.json'))['id'])")
curl --silent -H 'Content-Type: application/json' -d '{"queries": ["the black mug"]}' \
    "http://127.0.0.1:"${PORT:-8000}"/v1/scenes/$SCENE/ground"

echo "no picture" > broken.png
curl --silent -F image=@broken.png -F query="all balls" http://127.0.0.1:"${PORT:-8000}"/v1/ground

kill %1
wait %1

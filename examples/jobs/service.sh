#!/usr/bin/env bash
# The commands of docs/tutorials/service.md, from an empty folder on: a service is started, asked and ended.
#
#     examples/jobs/service.sh FOLDER
#     PORT=8099 examples/jobs/service.sh FOLDER                            # where 8080 is taken
#
# Needs the runtime alone, with `python` on the path, and curl.
set -euo pipefail
GEMVG=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

cp "$GEMVG"/examples/images/scene1-a.png left.png
cp "$GEMVG"/examples/images/scene1-b.png right.png

python "$GEMVG"/examples/service.py --port "${PORT:-8080}" &
curl --silent --retry 20 --retry-connrefused --retry-delay 1 http://127.0.0.1:"${PORT:-8080}"/health

curl --silent -F image=@left.png -F image=@right.png -F query="all balls" \
    http://127.0.0.1:"${PORT:-8080}"/ground > answer.json
python -m json.tool answer.json

echo "no picture" > broken.png
curl --silent -F image=@broken.png -F query="all balls" http://127.0.0.1:"${PORT:-8080}"/ground

kill %1
wait %1

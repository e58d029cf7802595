#!/bin/bash
# OpenVINO GenAI and what exports to it, in a Python environment of its own: WORK/tools/openvino.
#
#   bench/peers/openvino.sh WORK     some minutes and 3 GB; again, nothing
set -euo pipefail
# transformers 5 is past what optimum-intel 2.2 exports with.
PACKAGES=(openvino-genai==2026.4.1.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 optimum-intel==2.2.0
    optimum==2.3.0 nncf==3.4.0 transformers==4.57.6 torch==2.13.0 pillow==13.0.0)
home=$(realpath -m "$1")/tools/openvino
trap 'echo "openvino.sh: stopped at line $LINENO; see above, or remove $home and try again" >&2' ERR

[ "$(cat "$home/ready" 2>/dev/null || true)" != "${PACKAGES[*]}" ] || exit 0
[ -x "$home/bin/pip" ] || python3 -m venv "$home"
"$home/bin/pip" install --quiet --disable-pip-version-check "${PACKAGES[@]}"
echo "${PACKAGES[*]}" >"$home/ready"

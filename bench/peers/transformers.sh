#!/bin/bash
# transformers on PyTorch's CPU kernels, in a Python environment of its own: WORK/tools/transformers.
#
#   bench/peers/transformers.sh WORK     a minute or two and 1 GB; again, nothing
set -euo pipefail
PACKAGES=(transformers==5.23.0 torch==2.13.0 pillow==13.0.0)
home=$(realpath -m "$1")/tools/transformers
trap 'echo "transformers.sh: stopped at line $LINENO; see above, or remove $home and try again" >&2' ERR

[ "$(cat "$home/ready" 2>/dev/null || true)" != "${PACKAGES[*]}" ] || exit 0
[ -x "$home/bin/pip" ] || python3 -m venv "$home"
"$home/bin/pip" install --quiet --disable-pip-version-check "${PACKAGES[@]}"
echo "${PACKAGES[*]}" >"$home/ready"

#!/bin/bash
# llama.cpp as its makers would build it for this machine, from the source that llama-cpp-python's sdist carries.
#
#   bench/peers/llama_cpp.sh WORK     makes WORK/tools/llama-cpp: bin/, source/ and a Python for its converter
#
# Needs g++; cmake and ninja come from PyPI where they are missing. About ten minutes on two cores; again, nothing.
set -euo pipefail
VERSION=0.3.36   # of llama-cpp-python
CONVERTER=(torch==2.13.0 transformers==4.57.6 sentencepiece==0.2.1 'protobuf<7' pillow numpy)
home=$(realpath -m "$1")/tools/llama-cpp
trap 'echo "llama_cpp.sh: stopped at line $LINENO; remove $home and try again, or see above" >&2' ERR

[ "$(cat "$home/ready" 2>/dev/null || true)" != "$VERSION" ] || exit 0
command -v g++ >/dev/null || { echo "llama_cpp.sh: g++ is missing; install a C++ compiler" >&2; trap - ERR; exit 1; }
mkdir -p "$home"
[ -x "$home/venv/bin/pip" ] || python3 -m venv "$home/venv"
pip="$home/venv/bin/pip install --quiet --disable-pip-version-check"
export PATH="$PATH:$home/venv/bin"
command -v cmake >/dev/null || $pip cmake
command -v ninja >/dev/null || $pip ninja
if [ ! -d "$home/source" ]; then
    "$home/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python -d "$home/sdist" "llama-cpp-python==$VERSION"
    mkdir -p "$home/unpacked"
    tar xzf "$home"/sdist/llama_cpp_python-*.tar.gz -C "$home/unpacked" --strip-components=1
    mv "$home/unpacked/vendor/llama.cpp" "$home/source"
    rm -rf "$home/unpacked" "$home/sdist"
fi
cmake -S "$home/source" -B "$home/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_NUMBER=0 -DLLAMA_BUILD_COMMIT="$VERSION" >"$home/cmake.log" 2>&1
ninja -C "$home/build" llama-server llama-quantize >"$home/ninja.log" 2>&1
$pip "${CONVERTER[@]}"
echo "$VERSION" >"$home/ready"

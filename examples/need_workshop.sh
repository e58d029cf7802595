# Sourced by the scripts beside it: ends one whose PYTHON has the runtime alone, and not the workshop.
"$PYTHON" -c 'from importlib.util import find_spec as found
raise SystemExit(not all(map(found, ("torch", "trl", "tyro", "onnxscript"))))' 2>/dev/null || {
    echo "$0: $PYTHON has no workshop to train with; \`make workshop\` sets it up in .venv" >&2
    exit 2
}

# `gemvg serve` on a CPU, x86-64 or aarch64, with the native engine and ONNX Runtime. NOT YET BUILT: no Docker engine was
# at hand. Its steps were run without one, and tests/test_deploy.py holds its parts to the checkout.
#
#     docker build -t gemvg-edge .
#     docker run --rm --init --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 gemvg-edge
#
# docs/howto/deploy.md has bundles, tokens and limits.

FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY gemvg_edge gemvg_edge
# 1: a compiler that fails is an error, and no image without the engine.
ENV GEMVG_NATIVE=1 ORT_DISABLE_TELEMETRY=1
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN python -m venv /opt/gemvg \
    && /opt/gemvg/bin/pip install --no-cache-dir --constraint constraints.txt "$(echo /wheels/gemvg_edge-*.whl)[onnx,serve]" \
    && /opt/gemvg/bin/gemvg inspect

FROM python:3.11-slim-bookworm
# Nothing is written but to /tmp, so the image runs with --read-only; and ONNX Runtime tells Microsoft nothing.
ENV PATH=/opt/gemvg/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
COPY --from=build /opt/gemvg /opt/gemvg
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# http.client knows no proxy, whatever the environment says. It answers once the model is open.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
# The shipped model. Another one: -v /srv/my-bundle:/bundle:ro, and `serve /bundle --host 0.0.0.0` after the image's name.
ENTRYPOINT ["gemvg"]
CMD ["serve", "--host", "0.0.0.0"]

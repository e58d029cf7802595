"""The half of bench.interchange that runs in GPTQModel's own environment; imports nothing of this repository.

    python gptqmodel_side.py JOBS.json

Each job either quantises a checkpoint with GPTQModel or loads a GPTQ checkpoint with it and writes its logits. That
environment, on a CPU (GPTQModel's metadata asks for torch 2.14.1; 7.7.0 runs with 2.13.0):

    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6 pillow==13.0.0 \
        safetensors==0.8.0 protobuf==7.36.2 threadpoolctl==3.8.0 jinja2 requests ninja==1.13.2 dill setuptools wheel \
        logbar==0.4.15 device-smi==0.5.7 pypcre==0.6.4
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0 tokenicer==0.0.14 defuser==0.0.28
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with its default of 1 on two cores its loader fails

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.models.base import BaseQModel
from gptqmodel.models.definitions.qwen2_vl import Qwen2VLQModel

# Its Qwen2-VL wants a processor with a video half, which needs torchvision; only text is calibrated and asked here.
Qwen2VLQModel.require_load_processor = False
Qwen2VLQModel.prepare_dataset = BaseQModel.prepare_dataset


def quantise(checkpoint: str, out: str, ids: str, **options: Any) -> None:
    """Quantise with GPTQModel, calibrated on slices of the ids."""
    config = QuantizeConfig(device="cpu", offload_to_disk=False, **options)
    if not config.desc_act:
        config.act_group_aware = False
    model = GPTQModel.load(checkpoint, config, dtype=torch.float16)
    rows = np.load(ids).reshape(-1, 128)
    model.quantize(
        [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows],
        batch_size=1,
        backend=BACKEND.TORCH,
    )
    model.save(out)
    shutil.copy(Path(checkpoint) / "preprocessor_config.json", out)


def load(checkpoint: str, out: str, ids: str) -> None:
    """Logits (tokens, vocabulary) of the first 128 ids, the codes in GPTQModel's kernels, arithmetic in float32."""
    model = GPTQModel.load(checkpoint, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    model.model.float()
    tokens = torch.from_numpy(np.load(ids)[:128])[None]
    with torch.inference_mode():
        logits = model.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    np.save(out, logits[0].float().numpy())


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        (quantise if job.pop("do") == "quantise" else load)(**job)

"""DeepSpeed on gloo alone: its all-reduce in shared memory is compiled at first use, which takes half a minute."""

from __future__ import annotations

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

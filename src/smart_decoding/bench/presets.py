"""Two ready-made runs: `--quick`, to see something within three minutes, and `--full`, the report within an hour."""

from __future__ import annotations

from typing import Any

from smart_decoding.bench.data import DEFAULT_TASKS

_EAGLE_2 = "likelihood:depth=7,top_k=10,total_tokens=60"  # its published size
_SMALL = "likelihood:depth=2,top_k=3,total_tokens=6"  # what is best at batch 1 on two cores

QUICK: dict[str, Any] = {
    "policies": ("off", "smart", "smart_paper", "likelihood"), "policy_options": (_EAGLE_2,),
    "batch_sizes": (1, 4, 16), "limit": 8, "max_tokens": 64, "time_limit": 100.0,
}  # fmt: skip
FULL: dict[str, Any] = {
    "policies": ("off", "smart", "smart_paper", "likelihood"), "policy_options": (_EAGLE_2, _SMALL),
    "batch_sizes": (1, 2, 4, 8, 16, 32), "tasks": (*DEFAULT_TASKS, "long", "edit"), "limit": 32, "max_tokens": 96,
    "sampled": 0.8, "load": (0.3, 0.6, 0.9), "blocks": True, "time_limit": 3300.0,
}  # fmt: skip
PRESETS = {"quick": QUICK, "full": FULL}

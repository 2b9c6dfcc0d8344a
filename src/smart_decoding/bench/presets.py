"""The ready-made run `--quick`, to see something within three minutes."""

from __future__ import annotations

from typing import Any

EAGLE_2 = "eagle2:depth=7,top_k=10,total_tokens=60"  # its published size

QUICK: dict[str, Any] = {
    "policies": ("off", "smart", "paper", "eagle2"),
    "policy_options": (EAGLE_2,),
    "batch_sizes": (1, 4, 16),
    "limit": 8,
    "max_tokens": 64,
    "time_limit": 100.0,
}
PRESETS = {"quick": QUICK}

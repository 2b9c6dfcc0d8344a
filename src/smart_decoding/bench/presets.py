"""Two ready-made runs: `--quick`, to see something within three minutes, and `--full`, the report within an hour."""

from __future__ import annotations

from typing import Any

_EAGLE_2 = "likelihood:depth=7,top_k=10,total_tokens=60"  # its published size

QUICK: dict[str, Any] = {
    "policies": ("off", "smart", "smart_paper", "likelihood"), "policy_options": (_EAGLE_2,),
    "batch_sizes": (1, 4, 16), "limit": 8, "max_tokens": 64, "time_limit": 100.0,
}  # fmt: skip
FULL: dict[str, Any] = {
    "policies": ("off", "smart", "likelihood"), "policy_options": (_EAGLE_2,), "tune_likelihood": 3, "tune_paper": True,
    "batch_sizes": (1, 2, 4, 8, 16, 32), "limit": 40, "max_tokens": 96, "least_blocks": 8, "sampled": 0.8,
    "variants": ("all_levels", "cheap_kept", "cheap_costs"), "load": (0.3, 0.6, 0.9), "blocks": True,
    "suites": ("long", "edit"), "questions": True, "time_limit": 3300.0,
}  # fmt: skip
PRESETS = {"quick": QUICK, "full": FULL}

"""Prints the folder of a model in Hugging Face's layout, fetched if need be: for other engines.

Needed by `make test-vllm`.
"""

from __future__ import annotations

import sys

from smart_decoding.models.checkpoints.loading import load_checkpoint

print(load_checkpoint(sys.argv[1]).tokenizer_source)

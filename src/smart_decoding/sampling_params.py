"""vLLM's name of this module: scripts import from it once `vllm` is replaced."""

from smart_decoding.engine.sampling_params import RequestOutputKind, SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams

__all__ = ["RequestOutputKind", "SamplingParams", "StructuredOutputsParams"]

"""vLLM's name of this module: scripts import from it once `vllm` is replaced."""

from smart_decoding.engine.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = ["CompletionOutput", "Logprob", "RequestOutput"]

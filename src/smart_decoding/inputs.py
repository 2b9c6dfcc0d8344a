"""vLLM's name of this module: scripts import from it once `vllm` is replaced."""

from smart_decoding.multimodal.prompts import TextPrompt, TokensPrompt

__all__ = ["TextPrompt", "TokensPrompt"]

"""Llama 2 and 3, and what is built like them: Vicuna, SmolLM2, DeepSeek-R1's distillates."""

from smart_decoding.models.families.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    gguf="llama",
    options=frozenset({"attention_bias"}),
    gguf_pairs=True,
)

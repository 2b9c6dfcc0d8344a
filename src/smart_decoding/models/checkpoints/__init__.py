"""Where weights come from: hub, packages, GGUF, safetensors, and what they need of memory."""

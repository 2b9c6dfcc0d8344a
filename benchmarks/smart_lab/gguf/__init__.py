"""One GGUF file in several engines: ours, a llama.cpp built on this machine, and others."""

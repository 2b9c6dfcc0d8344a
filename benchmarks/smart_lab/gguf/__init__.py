"""One GGUF file in two engines: ours and a llama.cpp that was built on this machine."""

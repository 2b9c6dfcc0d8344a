"""Models on torch and on the CPU kernels: files, layers, heads, samplers, tokenizers."""

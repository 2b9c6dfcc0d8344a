"""Models: configurations, files, layers, heads, samplers and tokenizers, on torch and on the CPU
kernels."""

"""The models on the CPU kernels."""

"""The models on torch: layers, graphs, Triton."""

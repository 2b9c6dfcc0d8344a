"""The CPU kernels: C++ in csrc/, compiled for every kind of CPU, and their one Python face."""

"""`smart tune`: whether speculation pays in an engine that people have, and how (docs/tune.md).

search.py tries settings, found.py keeps and compares what was measured, report.py says it. An
engine is a file: llama_cpp.py, vllm.py, sglang.py.
"""

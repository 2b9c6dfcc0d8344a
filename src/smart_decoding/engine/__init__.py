"""The engine: requests, scheduling, paged KV, drafting, verification, sampling, stopping."""

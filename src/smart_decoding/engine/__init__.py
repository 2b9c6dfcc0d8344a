"""The engine: requests, scheduling, paged KV, rows of a forward, verification, sampling and
stopping."""

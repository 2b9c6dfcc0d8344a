"""Trains the demonstration model: a vision tower and projector in front of SmolLM2-135M, on
generated pictures."""

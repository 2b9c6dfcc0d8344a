"""Trains the demonstration model: a small vision tower and projector in front of SmolLM2-135M, on generated pictures."""

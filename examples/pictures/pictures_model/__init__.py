"""smart-pictures-135m: SmolLM2-135M behind a small vision tower, trained on generated pictures."""

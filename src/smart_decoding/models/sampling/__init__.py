"""From logits to the target's token."""

"""Pictures on their way into a prompt: reading, placing, and turning into pixels."""

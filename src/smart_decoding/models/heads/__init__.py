"""Draft heads: files, weights, export."""

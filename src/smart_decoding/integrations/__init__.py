"""Thin bridges to other engines; each can be imported without the others."""

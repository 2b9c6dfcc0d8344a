"""Thin bridges to engines that people already run; each can be imported without the others."""

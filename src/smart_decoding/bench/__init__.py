"""Measuring on this machine: blocks of requests under alternating policies, statistics and
reports."""

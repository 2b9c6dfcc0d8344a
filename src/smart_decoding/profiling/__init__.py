"""What a forward costs on this machine: measuring, rehearsing and caching it."""

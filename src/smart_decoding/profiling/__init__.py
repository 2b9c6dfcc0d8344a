"""The cost of a forward on this machine: measuring, rehearsing and caching it."""

"""`smart bench`: policies beside plain decoding on this machine, in alternating rounds."""

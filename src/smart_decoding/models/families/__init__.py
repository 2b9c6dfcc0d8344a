"""The architectures. A family is a file that describes it and a line in reading.py."""

"""The laboratory: what develops and questions SMART and is not in the wheel (`python -m smart_lab
--help`)."""

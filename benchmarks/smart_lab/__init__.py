"""The laboratory: tools to develop and question SMART, not in the wheel (`python -m smart_lab
--help`)."""

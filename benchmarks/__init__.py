"""Measurements side by side with peers and with physical limits."""

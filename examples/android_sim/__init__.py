"""Heterogeneous devices emulated on a desktop, each the real client on the real wire."""

"""Kernels of the rules that need all updates at once."""

"""Rewrites that never change what the model computes."""

"""Rewrites that trade a little accuracy, which they predict, for a cheaper model."""

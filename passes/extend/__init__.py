"""Passes that let a model remember more at no more operations per token."""

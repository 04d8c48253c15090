"""The operators on the CPU."""

"""Where a model's compute goes: one candidate per target, chosen together under one budget."""

"""Passes that spend less on some tokens, layers or steps; the model is trained with them."""

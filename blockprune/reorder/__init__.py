"""Hidden units in another order: the model computes the same, and weak units share blocks."""

"""The fourth stage, optional: reconstruct(data, masks) -> weights, and whole models repaired layer by layer."""

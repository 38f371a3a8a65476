"""Decisions before and after pruning: sensitivity by layer, cost against error, sweeps of recipes, and pictures of them."""

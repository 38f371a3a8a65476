"""Looking before pruning: the loss against sparsity, layer by layer and for the whole model, and how well data determines a repair."""

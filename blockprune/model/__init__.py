"""The model: its parameters and their masks, which of them to prune, what each is multiplied with, and how a model is run."""

"""Models: their parameters and masks, the rules that select parameters, the inputs of weights, and how a model is run."""

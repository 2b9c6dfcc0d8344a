"""Training a draft head for a model from text that the model writes itself."""

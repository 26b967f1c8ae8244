"""Training data: preparing a dataset from any source, and feeding it to a model."""

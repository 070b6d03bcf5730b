"""From a model source to local files and tensors."""

"""The checkpoint: which tensors exist, in which files, how to fetch and how to read them."""

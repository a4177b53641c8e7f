"""What is wrong with a cluster, before anything is loaded on it."""

"""The checks of a cluster before anything is loaded on it."""

"""The Kimi K2 model: one range of layers over a latent cache. Knows no processes and no text."""

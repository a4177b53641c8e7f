"""The client of `--connect`: an engine whose stages belong to a running server. Knows no terminal."""

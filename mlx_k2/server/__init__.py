"""The HTTP server: one loaded cluster for every client. Knows no terminal."""

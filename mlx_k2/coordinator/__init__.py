"""The loop that feeds the pipeline, and the text of its answers. Knows no terminal."""

"""Independent computations in other libraries, whose results are committed as small files."""

"""Computations in other libraries whose results are committed, so that tests can compare with them."""

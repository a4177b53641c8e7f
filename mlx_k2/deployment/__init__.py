"""Hosts and a model become stages that are ready, and that start again after a fault."""

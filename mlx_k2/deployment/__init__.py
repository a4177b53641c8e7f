"""Deployment: starts stages on hosts, loads the model into them, and restarts them after a fault."""

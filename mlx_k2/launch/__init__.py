"""Starts, watches and stops stage processes, locally and over ssh."""

"""The start, monitoring and end of stage processes, locally and over ssh."""

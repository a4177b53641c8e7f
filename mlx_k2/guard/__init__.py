"""The guard program, which starts one stage, watches it and ends it. Standard library only."""

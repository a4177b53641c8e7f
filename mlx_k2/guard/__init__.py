"""The guard program, which starts, monitors and ends one stage. Standard library only."""

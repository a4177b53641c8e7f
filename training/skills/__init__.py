"""What the model learns, one file for each skill: functions from a random source to a task."""

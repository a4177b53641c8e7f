"""The model's skills, one file each: functions that make a task from a random source."""

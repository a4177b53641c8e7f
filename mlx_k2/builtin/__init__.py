"""Files that ship with the program: the built-in model's chat template."""

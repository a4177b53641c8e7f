"""Checkpoints: the tensors that they must hold, their files, the download of files and the reading of tensors."""

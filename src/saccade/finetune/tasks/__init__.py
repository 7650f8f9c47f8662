"""The tasks: each file is one, and its name is what `--task` says."""

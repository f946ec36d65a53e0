"""A paused machine as a file: its format, what guards it, and checkpoints of it as a tree."""

"""Devices. Each is a short file that sees guest memory, its queues and the resources it was handed, nothing else."""

"""Kernels and root filesystems: where they come from and where they are kept."""

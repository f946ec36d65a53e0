"""Disk images as devices see them."""

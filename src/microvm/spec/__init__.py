"""Constants and wire layouts, taken from the specifications and nothing else. Standard library only."""

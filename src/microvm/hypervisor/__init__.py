"""Backends: what runs the guest's instructions. `base` is the contract, every other module one way to keep it."""

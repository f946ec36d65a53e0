"""One virtual machine: its configuration, its threads, and the wiring between backend, bus and devices."""

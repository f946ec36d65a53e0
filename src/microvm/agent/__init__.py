"""Running commands and moving files in the guest, with no network."""

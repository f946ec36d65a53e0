"""Other virtual machine monitors, started as a user of theirs would for speed."""

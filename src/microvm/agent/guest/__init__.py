"""The guest-side program (C, static): process 1 of a sandbox. Built with the package; not Python."""

"""``python -m microvm`` is the ``microvm`` command."""

import sys

from .cli import main

sys.exit(main())

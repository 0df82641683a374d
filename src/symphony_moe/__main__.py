"""`python -m symphony_moe` is the command `symphony`."""

import sys

from symphony_moe.cli import main

sys.exit(main())

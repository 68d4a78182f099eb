"""`python -m surgery` is the command `surgery`."""

import sys

from .cli.main import main

sys.exit(main())

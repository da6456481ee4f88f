"""`python -m imaginelens` is the command line."""

import sys

from imaginelens.cli import main

sys.exit(main())

"""`python -m selfmoa`: the command line."""

import sys

from selfmoa.cli import main

if __name__ == "__main__":
    sys.exit(main())

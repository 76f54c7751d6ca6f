"""`python -m specstop`: the same command without the script on the path."""

import sys

from specstop.cli import main

if __name__ == "__main__":
    sys.exit(main())

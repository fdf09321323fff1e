"""`python -m engine serve ...` is the same as `tokenmill serve ...`."""

import sys

from engine.cli import main

if __name__ == "__main__":
    sys.exit(main())

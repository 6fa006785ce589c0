"""``python -m pipeline``."""

import sys

from pipeline.cli import main

if __name__ == "__main__":  # workers import this module when they start
    sys.exit(main())

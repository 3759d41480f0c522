"""``python -m oag_transform`` is ``oag-transform``."""

import sys

from .apps.cli import main

if __name__ == "__main__":  # a process that --jobs starts imports this file under another name
    sys.exit(main())

"""``python -m metadiskfs``: the command line."""

import sys

from metadiskfs.cli.main import main

sys.exit(main())

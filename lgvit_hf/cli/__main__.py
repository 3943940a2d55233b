"""`python -m lgvit_hf.cli`."""

import sys

from .main import main

sys.exit(main())

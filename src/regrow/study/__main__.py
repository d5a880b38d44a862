"""``python -m regrow.study`` is the process of one run."""

import sys

from regrow.study.worker import main

if __name__ == "__main__":
    sys.exit(main())

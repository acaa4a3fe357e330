"""`ffsplit zoo` as the entry point of a Ray job; it takes the same flags.

ray job submit --working-dir . -- python jobs/zoo.py ZOO.yaml
"""

import sys

from ffsplit.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["zoo", *sys.argv[1:]], in_job=True))

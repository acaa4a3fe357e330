"""`ffsplit pull` as the entry point of a Ray job; it takes the same arguments and imports no torch.

ray job submit --working-dir . -- python jobs/retrieve.py URI DIR
"""

import sys

from ffsplit.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["pull", *sys.argv[1:]], in_job=True))

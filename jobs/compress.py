"""`ffsplit compress` as the entry point of a Ray job; it takes the same flags.

ray job submit --working-dir . -- python jobs/compress.py MODEL --out URI --keep 0.3535
"""

import sys

from ffsplit.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["compress", *sys.argv[1:]], in_job=True))

"""`ffsplit benchmark` as the entry point of a Ray job. It takes the same flags, and times on the job's node.

ray job submit --working-dir . -- python jobs/benchmark.py URI_OR_MODEL
"""

import sys

from ffsplit.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["benchmark", *sys.argv[1:]], in_job=True))

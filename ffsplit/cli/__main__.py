"""`python -m ffsplit.cli` is `ffsplit`."""

from ffsplit.cli.entry import main

if __name__ == "__main__":
    raise SystemExit(main())

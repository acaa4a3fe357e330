"""The command line: flags, what each command does, and what it prints."""

from ffsplit.cli.entry import main as main

"""The command line: flags, what each command does, and what it prints."""

from ffsplit.cli.main import main as main

"""The command line: one file a group of commands, and what they print."""

from ffsplit.cli.main import main as main

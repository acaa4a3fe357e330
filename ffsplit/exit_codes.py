"""What a command's process ends with, whatever happens in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ffsplit.errors import ConfigError, FFSplitError

DONE, FAILED, MISTAKE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
DESCRIPTION = """\
exit codes:
  0    done
  1    a failure while running
  2    a mistake in the command, a file or a setting
  3    finished, but refused by a gate
  130  interrupted; nothing was committed
"""


def exit_code_of(run: Callable[[], int]) -> int:
    """Run a command. An error is one line on stderr, and the exit code that goes with it."""
    try:
        return run()
    except ConfigError as error:
        print(f"ffsplit: {error}", file=sys.stderr)
        return MISTAKE
    except FFSplitError as error:
        print(f"ffsplit: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read the output has enough, as in `ffsplit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("ffsplit: interrupted, nothing was committed", file=sys.stderr)
        return INTERRUPTED

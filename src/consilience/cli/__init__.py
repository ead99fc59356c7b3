"""The command line: ``consilience solve | replay | tune | serve | methods | ledger | diffusion``.

Exit codes: 0 all answered, 3 some unanswered or the budget spent, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the ``consilience`` command."""
    from consilience.cli.app import app
    from consilience.errors import BudgetSpent, ConsilienceError

    try:
        app(standalone_mode=True)
    except BudgetSpent as error:
        print(f"error: {error}; what was bought is in the ledger", file=sys.stderr)
        sys.exit(3)
    except ConsilienceError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


__all__ = ["main"]

"""What happens when the user gives something that cannot be used.

Every command line of this project answers bad input in the same way: one line on stderr that says
what was wrong, what was expected and what to do; exit code 2; no traceback; nothing half-written.
A traceback therefore means a bug of ours, or, with many processes, that another one is gone.
"""
import errno
import sys


class InputError(Exception):
    """The user's input cannot be used. The message is one line: got, expected, what to do."""


def run(main) -> None:
    """Call `main()` as the body of a command line: InputError exits with 2, Ctrl-C with 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(f"error: cannot write {error.filename or ''}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

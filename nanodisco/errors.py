"""What happens when the user gives something that cannot be used.

Every command line of this project answers bad input in the same way: one line on stderr that says
what was wrong, what was expected and what to do; exit code 2; no traceback; nothing half-written.
A traceback therefore means a bug of ours, or, with many processes, that another one is gone.
"""
import errno
import os
import select
import sys


class InputError(Exception):
    """The user's input cannot be used. The message is one line: got, expected, what to do."""


def run(main) -> None:
    """Call `main()` as the body of a command line: InputError exits with 2, Ctrl-C with 130, `| head` with 141."""
    try:
        try:
            main()
        finally:                                                         # --help ends main by an exception
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # or Python complains as it ends
        sys.exit(141)                                                    # as a shell counts it
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        print(f"error: cannot write {error.filename or ''}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def reader_is_gone() -> bool:
    """Whether it is our stdout that nobody reads any more, and not some other pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))

"""What becomes of a process's output when its terminal closes."""

import os


def drop_output_of_closed_terminal() -> None:
    """Sends stdout and stderr nowhere, each if its terminal has closed: a line that nobody can read must not end a process.

    For a handler of SIGHUP. Every write to such a terminal would fail, in the middle of saving or of cleaning up.
    """
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)

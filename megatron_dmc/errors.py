"""The base class of every error that a user can mend."""


class DMCError(Exception):
    """Bad settings, bad files, or a run that cannot go on. The message is one line: what, where, and what to do.

    The command prints only the message, without a traceback (``megatron_dmc.cli``).
    """

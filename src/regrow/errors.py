"""The one exception type for mistakes a user can fix.

Everything regrow raises on bad input is a :class:`RegrowError`: a ``ValueError`` whose message is one line
that names the thing that is wrong and how to fix it. The command line prints it and exits with status 2;
any other exception is a defect of ours and keeps its traceback.
"""


class RegrowError(ValueError):
    """Bad input: the message names the argument, file or module, and the fix."""

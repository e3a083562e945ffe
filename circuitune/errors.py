"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can put right; the message is one sentence with a next step.

    Pattern: what must hold, what was found, what to do next. The command line prints the
    message alone and exits with status 2; in Python it is an ordinary exception.
    """

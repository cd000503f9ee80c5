"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Bad input: the message names the file, row, column or setting, and what to do.

    The command line shows it as one line, ``error: <message>``, and exits with status 2.
    """

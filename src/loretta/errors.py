"""The one exception class for input that a user can mend."""


class InputError(ValueError):
    """Bad input, refused at the door.

    The message is one sentence that quotes what was given and names the mend; the command line prints it
    and exits with status 2.
    """

"""The one exception for mistakes that a user can mend."""


class InputError(ValueError):
    """Bad input. The message names the thing, the value found and the remedy; the command line exits 2 with it."""

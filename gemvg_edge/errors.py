"""The one exception that the runtime raises for bad input; its text is a sentence a user can act on."""


class GemvgError(ValueError):
    """Bad input: the message names the file, field or argument and says how to mend it."""

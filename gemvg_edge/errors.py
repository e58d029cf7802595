"""What the runtime raises: bad input and stopped work; the text is a sentence a user can act on."""


class GemvgError(ValueError):
    """Bad input: the message names the file, field or argument and says how to mend it."""


class TimedOut(GemvgError, TimeoutError):
    """A request took longer than its `timeout`; nothing of it is kept, and the scene can be asked again."""


class Cancelled(GemvgError):
    """A request was cancelled by its `cancel` event; nothing of it is kept, and the scene can be asked again."""

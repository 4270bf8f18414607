"""The errors that this package raises on purpose; one `except SpartaError` catches them all."""


class SpartaError(ValueError):
    """Base of all errors of `sparta_act`; the text says what is wrong and what to do."""


class ShapeError(SpartaError):
    """A tensor or an argument of an activation does not fit."""


class SiteError(SpartaError):
    """The surgery was refused; nothing was changed."""


class WeightsError(SpartaError):
    """A set cannot be loaded, saved or sent: it is missing, broken, changed or no set."""


def readable(value: object, most: int = 2000) -> str:
    """Text of somebody else's value for a message: one line, printable, and not endless."""
    text = str(value)
    cut = f"... ({len(text)} characters)" if len(text) > most else ""
    line = " ".join(text[:most].split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) + cut

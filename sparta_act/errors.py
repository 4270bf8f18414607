"""The errors that this package raises on purpose; one `except SpartaError` catches them all."""


class SpartaError(ValueError):
    """Base of all errors of `sparta_act`; the text says what is wrong and what to do."""


class ShapeError(SpartaError):
    """A tensor or an argument of an activation does not fit."""


class SiteError(SpartaError):
    """The surgery was refused; nothing was changed."""


class WeightsError(SpartaError):
    """A set cannot be loaded, saved or sent: it is missing, broken, changed or no set."""

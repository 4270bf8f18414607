"""Every error this package raises on purpose: one base class, so one `except` catches them all."""


class SpartaError(ValueError):
    """Base of all errors of `sparta_act`: says what was asked, what was found and what to do."""


class ShapeError(SpartaError):
    """A tensor or an argument of an activation does not fit."""


class SiteError(SpartaError):
    """The surgery was refused; the model is as it was."""


class WeightsError(SpartaError):
    """A set of weights is missing, broken, tampered with or of another kind; nothing was loaded."""

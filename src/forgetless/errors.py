"""The exceptions that forgetless raises for a user's mistake.

They are one family, so that one `except` catches them all.

Every message is one line: where, what was expected, what came, what to do. The command line prints
it without a traceback and exits with status 2.
"""


class ForgetlessError(ValueError):
    """Something in the input, the data or a file on disk is wrong; the message says what to do."""


class RecipeError(ForgetlessError):
    """A recipe key, value or override that cannot be used."""


class ModelError(ForgetlessError):
    """A model that cannot be found or loaded, or that is no causal language model."""


class DataError(ForgetlessError):
    """Train, preserve or evaluation data that cannot be read, rendered or used together."""


class CalibrationError(ForgetlessError):
    """Second moments that cannot be collected or are not enough for the method."""


class MethodError(ForgetlessError):
    """A method option out of range, or a layer that the method cannot start on."""


class AdapterError(ForgetlessError):
    """An adapter that cannot be attached, loaded or exported."""


class ArtefactError(ForgetlessError):
    """A cache, checkpoint or record that is truncated, or that belongs to something else."""


class TrainingError(ForgetlessError):
    """A training run that cannot start, or that trains nothing."""


class ElsewhereError(ForgetlessError):
    """Another process of the run has failed, and says why; this one has nothing to add."""


class ForgetlessWarning(UserWarning):
    """Something works but has a consequence that the user should know: names the layer or file."""

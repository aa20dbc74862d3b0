"""The public errors. A subclass that only one module raises is defined in that module.

    GuardError                    anything below; its message is one line that names the remedy
    ├── InputError                the exchange cannot be judged
    │   ├── ImageError            an image is not allowed, broken, too large or has too many frames
    │   └── InputTooLongError     the exchange does not fit the model's context
    ├── ModelError                a model folder is missing, incomplete or of an unsupported kind
    ├── EngineError               the engine failed while it worked (time-out, HTTP 5xx, out of memory)
    │   └── RequestCancelledError the caller cancelled the request
    ├── RecipeError               a recipe has an unknown key or an impossible value
    ├── TrackerError              a tracker of learning curves could not begin or continue a run
    ├── DataError                 a data file or row breaks its format
    └── MissingExtraError         an optional dependency is not installed

`code` is the short machine-readable word that a `Verdict.error` carries.
"""


def reason_of(error: Exception, longest: int = 200) -> str:
    """A library's error in one line of at most `longest` characters: its message, or its type if it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


class GuardError(Exception):
    """Base of all errors raised on purpose."""

    code = "error"


class InputError(GuardError):
    """The exchange cannot be judged as given."""

    code = "invalid_input"


class ImageError(InputError):
    """An image was refused."""

    code = "invalid_image"


class InputTooLongError(InputError):
    """The exchange does not fit the model's context."""

    code = "input_too_long"


class ModelError(GuardError):
    """A model cannot be loaded."""

    code = "model"


class EngineError(GuardError):
    """The engine failed while it worked."""

    code = "engine"


class RequestCancelledError(EngineError):
    """The caller cancelled the request before it was answered."""

    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("the request was cancelled; send it again")


class RecipeError(GuardError):
    """A recipe is not valid."""

    code = "recipe"


class TrackerError(GuardError):
    """A tracker of learning curves could not begin or continue a run."""

    code = "tracker"


class DataError(GuardError):
    """A data file or one of its rows breaks its format."""

    code = "data"


class MissingExtraError(GuardError):
    """An optional dependency is missing; the message says what to install."""

    code = "missing_extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: install guardreasoner-vl with the extra '{extra}' (README, Install)"
        )

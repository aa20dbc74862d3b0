"""Every error this package raises on purpose.

    GuardError                    anything below; its text is one line that names the remedy
    ├── InputError                what the caller handed in cannot be judged
    │   ├── ImageError            an image is not allowed, broken, too large or has too many frames
    │   └── InputTooLongError     the exchange does not fit the model's context
    ├── ModelError                a model folder is missing, incomplete or of an unsupported kind
    ├── EngineError               the engine failed while it worked (time-out, HTTP 5xx, out of memory)
    │   └── CalledOffError        the caller no longer wants the answer
    ├── RecipeError               a recipe has an unknown key or an impossible value
    ├── DataError                 a data file or row breaks its format
    └── MissingExtraError         an optional dependency is not installed

`code` is the short machine-readable word that a `Verdict.error` carries.
"""


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


class CalledOffError(EngineError):
    """Nobody waits for the answer any more."""

    code = "called_off"

    def __init__(self) -> None:
        super().__init__("the answer was called off; ask again")


class RecipeError(GuardError):
    """A recipe is not valid."""

    code = "recipe"


class DataError(GuardError):
    """A data file or one of its rows breaks its format."""

    code = "data"


class MissingExtraError(GuardError):
    """An optional dependency is missing; the text says what to install."""

    code = "missing_extra"

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'guardreasoner-vl[{extra}]'")

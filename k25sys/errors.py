"""One exception class per fault, each a TypeError or a ValueError, so that callers may catch either kind."""

from collections.abc import Iterable


class ArgumentTypeError(TypeError):
    """An argument is not of the Python type that the op takes (a list for a tensor, a float for a count)."""


class DTypeError(TypeError):
    """A tensor has a dtype that the op does not take, or two tensors that must agree do not."""


class ShapeError(ValueError):
    """A tensor has the wrong number of dimensions or the wrong size along one."""


class DeviceError(ValueError):
    """Tensors lie on different devices, or on one for which no kernel was built."""


class LayoutError(ValueError):
    """A tensor is sparse, or a buffer that is written in place is not contiguous."""


class ArgumentValueError(ValueError):
    """A number is outside its range."""


class BackendError(ValueError):
    """A backend is unknown, or not available here."""


class ConfigError(ValueError):
    """A field of a model's configuration is missing, unknown, or contradicts another."""


class MediaCountError(ValueError):
    """The media_pad positions of the tokens are not as many as the rows that the media encode to."""


class FileFormatError(ValueError):
    """A file is not what its reader takes: of another kind, cut short, damaged, empty or too large."""


class ChatFormatError(ValueError):
    """A conversation, or a model's reply in one, does not keep to the chat format."""


class OptionalPackageError(ImportError):
    """A package that only some users need is not installed."""


class ExtensionMissingError(ImportError):
    """The native extension k25sys._C was not built or cannot be loaded."""


class CheckpointError(ValueError):
    """A file of a checkpoint is missing, extra, truncated or altered, or its tensors are not those of the model."""


class GridError(ValueError):
    """Sizes of a grid of ranks that contradict each other, the model, or the processes that were started."""


class ScheduleError(ValueError):
    """A pipeline schedule that is unknown, impossible for these sizes, incomplete, or that would deadlock."""


class DataError(ValueError):
    """Data ran out, a source does not keep to its contract, or a state is not of the streams that it is given to."""


class DataWorkerError(RuntimeError):
    """A process that reads data died or could not be started."""


class RankFailureError(RuntimeError):
    """Another rank died, hangs or failed; the message names it and the action in which it was waited for."""


class SandboxError(RuntimeError):
    """The interpreter of a sandbox cannot be started."""


class TrajectoryError(ValueError):
    """A generated program does not solve its problem, or does not go as its text says."""


class DivergenceError(RuntimeError):
    """Gradients that were not finite for many steps in a row; the parameters are those before them."""


def message(op: str, argument: str, got: object, accepted: str, hint: str = "") -> str:
    """The text of every argument error: op, argument, what was got, what is accepted, what to do."""
    return f"{op}: {argument}: got {got}, accepted {accepted}" + (f"; {hint}" if hint else "")


def listing(items: Iterable[str], *, most: int = 10, separator: str = ", ") -> str:
    """The first `most` of `items`, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])

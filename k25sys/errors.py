"""One exception class per fault, each a TypeError or a ValueError, so that callers may catch either kind."""


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


class FileFormatError(ValueError):
    """A file is not what its reader takes: of another kind, cut short, damaged, empty or too large."""


class ChatFormatError(ValueError):
    """A conversation, or a model's reply in one, does not keep to the chat format."""


class OptionalPackageError(ImportError):
    """A package that only some users need is not installed."""


class ExtensionMissingError(ImportError):
    """The native extension k25sys._C was not built or cannot be loaded."""


def message(op: str, argument: str, got: object, accepted: str, hint: str = "") -> str:
    """The text of every argument error: op, argument, what was got, what is accepted, what to do."""
    return f"{op}: {argument}: got {got}, accepted {accepted}" + (f"; {hint}" if hint else "")

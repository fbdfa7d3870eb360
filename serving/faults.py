"""What becomes of an exception: status, message and headers, in one table for HTTP and for WebSockets."""

from starlette.exceptions import HTTPException

from model.errors import InputError
from serving.scheduler import ClosingError, OutOfTimeError, QueueFullError
from serving.service import LoadingError, UnknownModelError


class ClientGoneError(Exception):
    """The client hung up before its answer began."""


class PerKeyError(Exception):
    """One key has too many requests at once."""


FORESEEN: tuple[type[Exception], ...] = (
    InputError,
    QueueFullError,
    PerKeyError,
    LoadingError,
    ClosingError,
    OutOfTimeError,
    ClientGoneError,
    UnknownModelError,
    HTTPException,
)


def described(fault: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, message and headers for any exception; what is not foreseen says nothing of itself."""
    match fault:
        case InputError():
            return 400, str(fault), {}
        case UnknownModelError():
            return 404, str(fault), {}
        case QueueFullError():
            return 429, str(fault), {"Retry-After": str(fault.retry_after)}
        case PerKeyError():
            return 429, str(fault), {"Retry-After": "1"}
        case LoadingError():
            return 503, str(fault), {} if fault.failed else {"Retry-After": "1"}
        case ClosingError() | OutOfTimeError():
            return 503, str(fault), {"Retry-After": "5"}
        case ClientGoneError():
            return 408, "the client hung up", {}
        case HTTPException():
            return fault.status_code, str(fault.detail), dict(fault.headers or {})
        case _:
            return 500, "something went wrong on the server; its log says what", {}

"""Every error a user can cause, in one tree. Each says what was wrong, the limit, and what to do next.

OctavoError
|-- ConfigError              a setting that cannot be (start-up; exit status 2)
|   |-- UnsupportedError     known to the field, not built here (names it)
|   `-- MemoryPlanError      weights or KV do not fit; carries the numbers
|-- ModelError               the model's files
|   |-- ModelNotFoundError   no such alias, folder, file or repository
|   |-- ModelFileError       truncated, corrupt, inconsistent, wrong checksum
|   |-- DownloadError        no network, no disk, a missing tool
|   `-- UnsupportedModelError  an architecture, quantisation type or rope kind without a row
|-- RequestError             one request; HTTP 400 unless its class says otherwise
|   |-- InvalidValueError    a value out of its bounds or of the wrong type
|   |-- UnsupportedParameterError  a parameter that is not honoured here
|   |-- ContextLengthError   prompt (+ max_tokens) longer than the context
|   |-- UnknownModelError    404
|   |-- UnknownResponseError  404
|   |-- QueueFullError       429, with the predicted wait
|   `-- TimeLimitError       408: the request's own timeout passed before its answer was complete
|-- EngineError              our fault
|   |-- StepError            a step failed; the requests that failed alone carry it
|   `-- EngineDeadError      the engine process is gone; 503
|       |-- EngineLoadingError  and another one is being loaded: come back in seconds
|       `-- EngineStoppedError  because the server is shutting down
`-- ServerError              what our own HTTP client heard: nobody there, or an error in answer
"""


class OctavoError(Exception):
    """Root of everything raised on purpose."""


class ConfigError(OctavoError):
    """A setting that cannot be."""


class UnsupportedError(ConfigError):
    """A setting or feature known to the field that Octavo does not build (yet)."""


class MemoryPlanError(ConfigError):
    """Weights or KV cache do not fit into the memory there is."""


class ModelError(OctavoError):
    """Something is wrong with the model's files."""


class ModelNotFoundError(ModelError):
    """No such alias, folder, file or repository."""


class ModelFileError(ModelError):
    """A truncated, corrupt or inconsistent file, or a wrong checksum."""


class DownloadError(ModelError):
    """Fetching failed: no network, no disk space, a missing tool."""


class UnsupportedModelError(ModelError):
    """An architecture, tensor type or rope kind that has no row in our tables."""


class RequestError(OctavoError):
    """One request is wrong. `param` names the field, `code` is the machine-readable reason."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidValueError(RequestError, ValueError):
    """A value out of its bounds, or of the wrong type."""

    code = "invalid_value"


class UnsupportedParameterError(RequestError, ValueError):
    """A parameter that is not honoured here; refusing beats swallowing."""

    code = "unsupported_parameter"


class ContextLengthError(RequestError, ValueError):
    """The prompt, or prompt plus max_tokens, is longer than the context."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"


class UnknownResponseError(RequestError):
    """The request names a response that is not stored."""

    status = 404
    type = "not_found_error"
    code = "response_not_found"


class QueueFullError(RequestError):
    """The bounded waiting queue is full; `retry_after` is the predicted wait in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TimeLimitError(RequestError):
    """The request's own `timeout` passed before its answer was complete."""

    status = 408
    type = "timeout"
    code = "timeout"


class EngineError(OctavoError):
    """Our fault."""

    status = 500
    type = "server_error"
    code: str | None = None


class StepError(EngineError):
    """A step failed, and the request failed again when it was retried alone."""


class EngineDeadError(EngineError):
    """The engine process is gone."""

    status = 503
    type = "service_unavailable"
    code = "engine_dead"


class EngineLoadingError(EngineDeadError):
    """The engine process is gone, and another one is being loaded."""

    code = "loading"


class EngineStoppedError(EngineDeadError):
    """The engine process was ended because the server is shutting down."""

    code = "draining"


class ServerError(OctavoError):
    """A server that the command line talks to cannot be reached, or answered with an error."""

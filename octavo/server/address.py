"""The address that the server listens on: tried before a model is loaded, taken when one is."""

import socket

from octavo.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that nobody else can. Raises ConfigError where nobody could, or somebody does."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port must be from 0 (any free one) to 65535, not {port}")
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except (OSError, UnicodeError) as error:  # the latter: a name that no host can have
        if bound is not None:
            bound.close()
        why = getattr(error, "strerror", error)
        raise ConfigError(
            f"cannot listen on {host}:{port} ({why}): choose another --host or --port, or --port 0"
        ) from error
    return bound

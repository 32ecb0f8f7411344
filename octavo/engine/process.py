"""The engine process: `python -m octavo.engine.process SOCKET PIPE`. Owns ids, blocks and the runtime; knows no text.

One thread: messages are read between steps, outputs are written without blocking. It ends when the front does.
"""

import faulthandler
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

from octavo.config import DEFAULT_QUEUE
from octavo.engine.calibrate import prepare
from octavo.engine.channel import EngineChannel, StartEngine
from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.executor.local import LocalExecutor
from octavo.messages import EngineFailed, Shutdown
from octavo.models.spec import ModelFiles


def main(fd: int, pipe: int) -> int:
    """Serves one front, heard over the socket `fd` and told through `pipe`; returns the exit status."""
    faulthandler.enable()  # a native crash writes where it was to the log
    faulthandler.register(signal.SIGUSR1)  # and so does an engine that stalls
    channel = EngineChannel(socket.socket(fileno=fd), pipe)
    first = channel.receive(wait=True)
    if not first or not isinstance(first[0], StartEngine):
        return 0 if channel.closed else 1
    try:
        core = _build(first[0])
    except OctavoError as error:
        channel.send(EngineFailed(type(error).__name__, str(error)))
        return 2
    except MemoryError:
        channel.send(EngineFailed("MemoryPlanError", "out of memory while loading: take a smaller --max-model-len"))
        return 2
    core.announce = channel.publish
    channel.send(core.ready())
    for message in first[1:]:
        core.handle(message)
    is_working = core.has_work
    while not channel.closed:
        for message in channel.receive(wait=not is_working):
            if isinstance(message, Shutdown):
                core.close()
                return 0
            core.handle(message)
        is_working = core.has_work
        if is_working:
            channel.publish(core.step())
    core.close()
    return 0


def _build(start: StartEngine) -> EngineCore:
    files = ModelFiles(start.model_name, "gguf" if start.model_format == "gguf" else "hf", Path(start.model_path))
    executor = LocalExecutor(start.config, files)
    core = EngineCore(
        start.config,
        executor,
        executor.start(),
        default_queue=DEFAULT_QUEUE,
        # imported for the first grammar, if one comes
        tokenizer=lambda: import_module("octavo.text.load").load_text(start.config, files).tokenizer,
    )
    prepare(core, serving=True)
    return core


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

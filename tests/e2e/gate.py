"""Engines that stand still in the middle of their streams until a test lets them go on, however fast the machine is."""

import asyncio
import os

from serving import ROOT

SOURCE = """
import time
from pathlib import Path
from octavo.worker.steady import Batches
ungated = Batches.next
def gated(batches, scheduled):
    while sum(row.start for row in scheduled) >= int(Path({path!r}).read_text()):
        time.sleep(0.001)
    return ungated(batches, scheduled)
Batches.next = gated
"""


class Gate:
    """Every engine that starts from now on looks at it before each step; `more` is run by each of them, too."""

    def __init__(self, folder, monkeypatch, more=""):
        self._path = folder / "positions"
        self.open()
        (folder / "sitecustomize.py").write_text(SOURCE.format(path=str(self._path)) + more)
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")

    def hold_at(self, positions):
        """No step begins whose rows have come so far, all together."""
        written = self._path.with_suffix(".new")
        written.write_text(str(positions))
        os.replace(written, self._path)

    def open(self):
        """Nothing is held any more."""
        self.hold_at(1 << 40)

    async def start(self, streams):
        """Runs streams, the first step when all of them are there."""
        self.hold_at(0)
        running = asyncio.create_task(streams.run())
        while streams.engine.progress().num_unfinished < len(streams.tokens):
            await asyncio.sleep(0.001)
        return running

    async def catch(self, streams, length):
        """Lets streams come to `length` positions each, on average, and no further."""
        self.hold_at(length * len(streams.tokens))
        await streams.reached((length - 6) * len(streams.tokens))

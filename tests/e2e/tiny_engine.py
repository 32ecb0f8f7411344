"""A real engine process on a tiny model with seeded weights."""

import asyncio

from octavo import AsyncEngine, EngineConfig


def with_engine(folder, use, *, seconds=60, **settings):
    """Runs `await use(engine)` on a fresh engine; `folder` is the fixture of that name."""

    async def body():
        engine = await AsyncEngine.start(EngineConfig(model=str(folder), load_format="dummy", **settings))
        try:
            return await use(engine)
        finally:
            await engine.shutdown()

    return asyncio.run(asyncio.wait_for(body(), seconds))

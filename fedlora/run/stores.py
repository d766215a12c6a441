"""Bytes in the stores of engines as workers get them; the engine is imported in the worker, which is one of its own."""

from __future__ import annotations

from typing import Any


class InRay:
    """An object of Ray's. Not a dataclass: Prefect looks into those, and Ray would send along what it finds."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def get(self) -> bytes:
        """The bytes.

        Raises:
            LookupError: the machine that held them has gone.
        """
        import ray

        try:
            content: bytes = ray.get(self._found)
        except (ray.exceptions.ObjectLostError, ReferenceError) as error:
            raise LookupError(str(error)) from None
        return content


class InDask:
    """Data that was scattered among workers of Dask's. Who scattered it holds the future; what travels is its key."""

    def __init__(self, future: Any) -> None:
        self._future, self._key = future, future.key

    def __reduce__(self) -> tuple[Any, ...]:
        return _known, (self._key,)

    def get(self) -> bytes:
        """The bytes.

        Raises:
            LookupError: the worker that held them has gone.
        """
        from distributed import get_worker
        from distributed.utils import sync
        from distributed.utils_comm import gather_from_workers

        # A future that is made here of the key alone would wait for ever, and so would one whose data is lost.
        worker: Any = get_worker()

        async def gathered() -> Any:
            who_has = await worker.scheduler.who_has(keys=[self._key])
            return await gather_from_workers(who_has, rpc=worker.rpc, who=worker.address)

        found = sync(worker.loop, gathered)[0]
        if self._key not in found:
            raise LookupError(self._key)
        content: bytes = found[self._key]
        return content


def _known(key: str) -> InDask:
    found = InDask.__new__(InDask)
    found._future, found._key = None, key
    return found


def gpu(engine: str) -> int | None:
    """The GPU that the engine has given to the task in this process; None for none.

    Args:
        engine: `runner.kind`.
    """
    if engine == "ray":
        import ray

        ids = ray.get_gpu_ids()
        return int(ids[0]) if ids else None
    return 0  # a worker of Dask's sees its own alone, where it was told to (CUDA_VISIBLE_DEVICES, as dask-cuda does)

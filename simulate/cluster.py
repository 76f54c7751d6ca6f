"""A Dask client: on processes of our own, or on a scheduler that is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["client"]


@contextmanager
def client(workers: int, scheduler: str | None) -> Iterator[tuple[Any, Any]]:
    """A Dask client and `as_completed`; `workers` processes of our own unless there is a scheduler.

    Raises:
        ValueError: if nobody answers at the scheduler's address.
    """
    import logging

    from dask.distributed import Client, LocalCluster, as_completed

    if scheduler is not None:
        try:
            found = Client(scheduler, timeout="20s")
        except (OSError, ValueError) as error:
            raise ValueError(f"scheduler: no answer from {scheduler!r:.100} ({type(error).__name__})") from None
        with found:
            yield found, as_completed
        return
    quiet = {"silence_logs": logging.CRITICAL, "dashboard_address": None}
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **quiet) as cluster,
        Client(cluster) as own,
    ):
        yield own, as_completed

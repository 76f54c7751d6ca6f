"""How far a recording is, for whoever watches."""

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar over requests on stderr, with the time left; a caller's own callable; or nothing."""

    def __init__(self, wanted: bool | Callable[[int], Any] | None = False, total: int = 0, done: int = 0):
        self.call = wanted if callable(wanted) else None
        self.shown = self.call is None and (sys.stderr.isatty() if wanted is None else bool(wanted))
        self.total, self.count, self.bar = total, done, None

    def __enter__(self) -> "Progress":
        if self.shown:
            from tqdm.auto import tqdm

            # The mean rate: batches take unequal times, and the time left is what one wants to know.
            self.bar = tqdm(
                total=self.total, initial=self.count, smoothing=0, file=sys.stderr,
                bar_format="recording: {percentage:3.0f}%|{bar}| {n:.1f} of {total} requests, {elapsed} gone, "
                           "{remaining} left",
            )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def done(self, count: int) -> None:
        """So many more requests are done."""
        self.count += count
        self._show(self.count)
        if self.call is not None:
            self.call(count)

    def within(self, count: int) -> Callable[[float], None]:
        """To be told what share is done of the next so many."""
        return lambda share: self._show(self.count + share * count)

    def _show(self, position: float) -> None:
        if self.bar is not None:
            self.bar.update(position - self.bar.n)

"""Key-value caches for recording: columns are written in place, and a read may touch some rows of the batch only.

`transformers`' own cache copies everything it holds each time a token is appended: at 300 columns that is a sixth of
a decoding step. Here each layer keeps a buffer with room to grow, filled with zeros, because what a row has never
written is masked but still multiplied by a weight of zero.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["GrowingLayer", "growing_cache"]

ROOM = 64
"""Columns by which a full buffer grows: copied once in so many tokens, and no more than that is held in vain."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [rows, heads, columns, width]; a read appends to `rows`, the others stay zero."""

    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size, self.rows = batch_size, slice(None)
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns to the rows at hand and return all columns of those rows."""
        first = self.get_seq_length()
        last = first + key_states.shape[-2]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if not self.buffers:
            self.buffers = [part.new_empty(self.batch_size, part.shape[1], 0, part.shape[3])
                            for part in (key_states, value_states)]  # fmt: skip
        if last > self.buffers[0].shape[2]:
            self.keys = self.values = None  # else they would hold on to the old buffers
            for index in range(2):
                self.buffers[index] = _grown(self.buffers[index], first, last + ROOM)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[self.rows, :, first:last] = states
        self.keys, self.values = (buffer[:, :, :last] for buffer in self.buffers)
        return self.keys[self.rows], self.values[self.rows]

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        for buffer in self.buffers:
            buffer[[one, other]] = buffer[[other, one]]


def _grown(buffer: Tensor, used: int, columns: int) -> Tensor:
    rows, heads, _, width = buffer.shape
    out = buffer.new_zeros(rows, heads, columns, width)
    out[:, :, :used] = buffer[:, :, :used]
    return out


def growing_cache(config: Any, batch_size: int) -> DynamicCache:
    """A cache for the model of this config; layers of kinds that cannot grow in place are left as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(batch_size) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

r"""A batch of token sequences in one model's key-value cache, with branches.

Each column of the cache holds one token per sequence, with its *position* (what rotary embeddings see) and its
*owner*: the sequence's own path, a numbered branch that leaves the path, or padding. A token sees

* the columns of its own owner up to its own position, and
* for a branch, the path's columns before the position where the branch forks off.

So the divergent rollouts of all positions of a request are read side by side against one stored path, instead of
copying the path's cache once per rollout. That needs attention which sees all columns: sliding windows and
recurrent layers are refused. Masks and positions are given explicitly, which makes left padding harmless.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["PADDING", "PATH", "Reader", "Rows", "check_attention", "input_device"]

PATH, PADDING = -1, -2


def check_attention(model: Any, name: str) -> None:
    """Refuse models whose layers do not keep and see every column."""
    from transformers import DynamicCache

    layers = getattr(DynamicCache(config=model.config), "layers", [])
    if any(getattr(layer, "is_sliding", False) or not getattr(layer, "is_croppable", True) for layer in layers):
        raise ValueError(f"{name}: needs full attention in every layer (no sliding window or recurrent layers)")


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs: its own device or, if it is spread over several, where its embedding works.

    `model.device` is `meta` where accelerate keeps the weights elsewhere until they are used.
    """
    embedding = model.get_input_embeddings()
    return torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", embedding.weight.device))


class Reader:
    """Reads tokens into a model's cache and returns the logits after them, on `device` (that of its inputs)."""

    def __init__(self, model: Any, batch_size: int, vocab_size: int, device: Any = None):
        from realmodels.cache import GrowingLayer, growing_cache

        self.model, self.dtype = model, model.dtype
        inputs = input_device(model)
        self.out_device = inputs if device is None else device
        self.vocab_size = vocab_size
        self.cache = growing_cache(model.config, batch_size)
        self.selects_rows = all(isinstance(layer, GrowingLayer) for layer in self.cache.layers)
        self.owner = torch.empty((batch_size, 0), dtype=torch.long, device=inputs)
        self.position = self.owner.clone()
        self.hidden: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.owner.shape[1]

    @torch.inference_mode()
    def read(
        self,
        tokens: Tensor,
        position: Tensor,
        owner: Tensor | None = None,
        fork: Tensor | None = None,
        keep: int | None = None,
        keep_hidden: bool = False,
        rows: slice | None = None,
    ) -> Tensor:
        """Append columns and return float32 logits [B, keep, vocabulary] after the last `keep` of them (all).

        Args:
            tokens, position: [B, Q].
            owner: [B, Q]; the path unless given.
            fork: [B, Q]; first position of the path that a branch's token does not see.
            keep_hidden: leave the last hidden states of those columns in `self.hidden`.
            rows: the sequences that B stands for, if not all (where `selects_rows`); the others get padding.
        """
        device = self.owner.device
        tokens, position = tokens.to(device), position.to(device)
        owner = torch.full_like(tokens, PATH) if owner is None else owner.to(device)
        fork = torch.zeros_like(tokens) if fork is None else fork.to(device)
        rows = slice(None) if rows is None else rows
        if self.selects_rows:
            for layer in self.cache.layers:
                layer.rows = rows  # type: ignore[attr-defined]
        self.owner = self._append(self.owner, owner, PADDING, rows)
        self.position = self._append(self.position, position, 0, rows)
        owners, positions = self.owner[rows, None, :], self.position[rows, None, :]
        own = (owners == owner[:, :, None]) & (positions <= position[:, :, None])
        trunk = (owners == PATH) & (positions < fork[:, :, None])
        mask = torch.zeros(own.shape, dtype=self.dtype, device=device)
        mask.masked_fill_(~(own | trunk), torch.finfo(self.dtype).min)
        keep = tokens.shape[1] if keep is None else keep
        with _shared_heads(device):
            out = self.model(
                input_ids=tokens,
                attention_mask=mask[:, None],
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep,
                output_hidden_states=keep_hidden,
            )
        self.hidden = out.hidden_states[-1][:, -keep:] if keep_hidden else None
        return out.logits[..., : self.vocab_size].float().to(self.out_device)

    @staticmethod
    def _append(held: Tensor, columns: Tensor, other: int, rows: slice) -> Tensor:
        added = torch.full((held.shape[0], columns.shape[1]), other, dtype=held.dtype, device=held.device)
        added[rows] = columns
        return torch.cat([held, added], 1)

    @torch.inference_mode()
    def swap(self, one: int, other: int) -> None:
        """Let two sequences change places (where `selects_rows`)."""
        for part in (self.owner, self.position):
            part[[one, other]] = part[[other, one]]
        for layer in self.cache.layers:
            layer.swap(one, other)  # type: ignore[attr-defined]

    def crop(self, num_columns: int) -> None:
        """Forget all columns but the first `num_columns`."""
        removed = self.num_columns - num_columns
        if removed > 0:
            self.cache.crop(-removed)
            self.owner, self.position = self.owner[:, :num_columns], self.position[:, :num_columns]


class Rows:
    """A model's reader, of which some rows are read. One that reads all rows at a time gets padding for the others."""

    def __init__(self, reader: Any, batch_size: int):
        self.reader, self.native = reader, getattr(reader, "selects_rows", False)
        self.place = torch.arange(batch_size)
        self.hidden: Tensor | None = None

    def read(
        self, rows: slice, tokens: Tensor, position: Tensor, owner: Tensor, fork: Tensor | None = None,
        keep: int | None = None, keep_hidden: bool = False,
    ) -> Tensor:  # fmt: skip
        """As `Reader.read` of these rows alone."""
        fork = torch.zeros_like(tokens) if fork is None else fork
        if self.native:
            logits = self.reader.read(tokens, position, owner, fork, keep, keep_hidden, rows=rows)
            self.hidden = self.reader.hidden
            return logits
        place = self.place[rows]
        wide = [torch.full((len(self.place), part.shape[1]), fill).index_copy(0, place, part)
                for part, fill in ((tokens, 0), (position, 0), (owner, PADDING), (fork, 0))]  # fmt: skip
        logits = self.reader.read(*wide, keep, keep_hidden)
        self.hidden = None if self.reader.hidden is None else self.reader.hidden[place.to(self.reader.hidden.device)]
        return logits[place.to(logits.device)]

    def swap(self, one: int, other: int) -> None:
        if self.native:
            self.reader.swap(one, other)
        else:
            self.place[[one, other]] = self.place[[other, one]]


@contextmanager
def _shared_heads(device: torch.device) -> Iterator[None]:
    """On the CPU, query heads that share keys and values read them where they are.

    Under a mask `transformers` copies them for each head, as GPU kernels need; here that is two thirds of attention.
    """
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    if device.type == "cpu" and before is None:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)

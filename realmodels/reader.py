r"""A batch of token sequences in one model's key-value cache, with branches.

Each column of the cache holds one token per sequence, with its *position* (what rotary embeddings see) and its
*owner*: the sequence's own path, a numbered branch that leaves the path, or padding. A token sees

* the columns of its own owner up to its own position, and
* for a branch, the path's columns before the position where the branch forks off.

So the divergent rollouts of all positions of a request are read side by side against one stored path, instead of
copying the path's cache once per rollout. That needs attention which sees all columns: sliding windows and
recurrent layers are refused. Masks and positions are given explicitly, which makes left padding harmless.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["PADDING", "PATH", "Reader", "check_attention"]

PATH, PADDING = -1, -2


def check_attention(model: Any, name: str) -> None:
    """Refuse models whose layers do not keep and see every column."""
    from transformers import DynamicCache

    layers = getattr(DynamicCache(config=model.config), "layers", [])
    if any(getattr(layer, "is_sliding", False) or not getattr(layer, "is_croppable", True) for layer in layers):
        raise ValueError(f"{name}: needs full attention in every layer (no sliding window or recurrent layers)")


class Reader:
    """Reads tokens into a model's cache and returns the logits after them, on `device` (the model's own)."""

    def __init__(self, model: Any, batch_size: int, vocab_size: int, device: Any = None):
        from transformers import DynamicCache

        self.model, self.dtype = model, model.dtype
        self.out_device = model.device if device is None else device
        self.vocab_size = vocab_size
        self.cache = DynamicCache(config=model.config)
        self.owner = torch.empty((batch_size, 0), dtype=torch.long, device=model.device)
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
    ) -> Tensor:
        """Append columns and return float32 logits [B, keep, vocabulary] after the last `keep` of them (all).

        Args:
            tokens, position: [B, Q].
            owner: [B, Q]; the path unless given.
            fork: [B, Q]; first position of the path that a branch's token does not see.
            keep_hidden: leave the last hidden states of those columns in `self.hidden`.
        """
        device = self.owner.device
        tokens, position = tokens.to(device), position.to(device)
        owner = torch.full_like(tokens, PATH) if owner is None else owner.to(device)
        fork = torch.zeros_like(tokens) if fork is None else fork.to(device)
        self.owner = torch.cat([self.owner, owner], 1)
        self.position = torch.cat([self.position, position], 1)
        own = self.owner[:, None, :] == owner[:, :, None]
        own &= self.position[:, None, :] <= position[:, :, None]
        trunk = (self.owner == PATH)[:, None, :] & (self.position[:, None, :] < fork[:, :, None])
        mask = torch.zeros(own.shape, dtype=self.dtype, device=device)
        mask.masked_fill_(~(own | trunk), torch.finfo(self.dtype).min)
        keep = tokens.shape[1] if keep is None else keep
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

    def crop(self, num_columns: int) -> None:
        """Forget all columns but the first `num_columns`."""
        removed = self.num_columns - num_columns
        if removed > 0:
            self.cache.crop(-removed)
            self.owner, self.position = self.owner[:, :num_columns], self.position[:, :num_columns]

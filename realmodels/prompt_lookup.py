r"""Prompt lookup: a draft without a model, which copies what followed the same words earlier in the text.

After a text $x_1..x_t$ take the longest suffix of at most `ngram` tokens that occurred before. The law $q$ is how often
each token followed it, over all earlier occurrences; if no suffix did, the suffix of no tokens is left, which is
followed by every token of the text. So $q$ is a proper law of the prefix alone: verification is lossless, replay is
exact, and features say how sure the look-up is (`top_prob` 1 where all occurrences agree; a high entropy where only the
empty suffix matched). A draft step costs microseconds.

The published rule drafts the tokens behind one match as they stand. This is its law-valued form: a candidate is drawn
from $q$, and the next candidate's look-up sees it.

References:
    Saxena, *Prompt Lookup Decoding* (2023); `prompt_lookup_num_tokens`, `max_matching_ngram_size` in transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realmodels.reader import PADDING, PATH

__all__ = ["LookupReader", "PromptLookup", "continuations"]


@dataclass(frozen=True)
class PromptLookup:
    """The draft `lookup:ngram=N`."""

    ngram: int = 3


def continuations(text: Sequence[int] | np.ndarray, ngram: int) -> np.ndarray:
    """What followed each earlier occurrence of the longest suffix of `text` of at most `ngram` tokens that has one.

    Example:
        >>> continuations([5, 7, 8, 5, 7, 9, 5, 7], 3).tolist()
        [8, 9]
        >>> continuations([5, 7, 8], 3).tolist()
        [5, 7, 8]
    """
    text = np.asarray(text)
    ends = np.arange(len(text) - 1)  # where a suffix of length 1, 2, .. that occurred before may end
    best = text
    for back in range(min(ngram, len(text) - 1)):
        ends = ends[ends >= back]
        ends = ends[text[ends - back] == text[-1 - back]]
        if len(ends) == 0:
            break
        best = text[ends + 1]
    return best


class LookupReader:
    """Reads tokens as `realmodels.reader.Reader` does, branches included, and looks up instead of computing."""

    hidden: Tensor | None = None
    selects_rows = True

    def __init__(self, lookup: PromptLookup, batch_size: int, vocab_size: int, device: Any = "cpu"):
        self.ngram, self.vocab_size, self.device = lookup.ngram, vocab_size, device
        self.columns = np.empty((3, batch_size, 0), dtype=np.int64)  # token, position, owner

    @property
    def num_columns(self) -> int:
        return self.columns.shape[2]

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
        """Append columns and return float32 logits [B, keep, vocabulary], log counts, after the last `keep` of them.

        Args:
            rows: the sequences that B stands for, if not all; the others get padding.
        """
        if keep_hidden:
            raise ValueError("draft: prompt lookup has no hidden states")
        owner = torch.full_like(tokens, PATH) if owner is None else owner
        fork = torch.zeros_like(tokens) if fork is None else fork
        chosen = range(self.columns.shape[1])[slice(None) if rows is None else rows]
        read = torch.stack([tokens, position, owner, fork]).cpu().numpy()
        added = np.zeros((3, self.columns.shape[1], tokens.shape[1]), dtype=np.int64)
        added[2] = PADDING
        added[:, chosen] = read[:3]
        self.columns = np.concatenate([self.columns, added], 2)
        keep = tokens.shape[1] if keep is None else keep
        logits = torch.full((len(chosen), keep, self.vocab_size), -torch.inf)
        for index, row in enumerate(chosen):
            for column, (_, at, mine, leaves) in enumerate(read[:, index, tokens.shape[1] - keep :].T):
                if mine == PADDING:  # read by nobody
                    logits[index, column] = 0.0
                    continue
                followed = continuations(self._text(row, at, mine, leaves), self.ngram)
                token, count = np.unique(followed, return_counts=True)
                logits[index, column, torch.from_numpy(token)] = torch.from_numpy(np.log(count)).float()
        return logits.to(self.device)

    def swap(self, one: int, other: int) -> None:
        """Let two sequences change places."""
        self.columns[:, [one, other]] = self.columns[:, [other, one]]

    def _text(self, row: int, at: int, owner: int, fork: int) -> np.ndarray:
        """What a token at a position sees of its row, itself included, in order."""
        token, position, owners = self.columns[:, row]
        seen = ((owners == owner) & (position <= at)) | ((owners == PATH) & (position < fork))
        return token[seen][np.argsort(position[seen], kind="stable")]

    def crop(self, num_columns: int) -> None:
        """Forget all columns but the first `num_columns`."""
        self.columns = self.columns[:, :, :num_columns]

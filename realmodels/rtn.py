"""Round-to-nearest copies of a target: drafts that need no training and no files.

Each row of a linear layer is cut into groups of `group` weights, and each group is rounded to 2^bits evenly spaced
levels between its least and its greatest weight. Embedding and output head stay as they are. The copy computes in
floating point ("fake-quantised"): its laws are real, its time is the target's own, so a report that gains from it
must use a declared draft time and say so.
"""

import copy
from typing import Any

import torch
from torch import Tensor

__all__ = ["quantised_copy", "round_to_nearest"]


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """`weight` [out, in] with every group of columns in a row rounded to 2^bits levels (the last may be shorter)."""
    rounded = []
    for part in weight.split(group, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
        rounded.append(((part - low) / step).round() * step + low)
    return torch.cat(rounded, 1)


@torch.no_grad()
def quantised_copy(model: Any, bits: int, group: int) -> Any:
    """A copy of a causal language model with rounded linear layers; embedding and head are shared, not copied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = {id(module.weight): module.weight for module in (embedding, head)}
    draft = copy.deepcopy(model, memo=shared)
    for module in draft.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not head.weight:
            module.weight.copy_(round_to_nearest(module.weight, bits, group))
    return draft

r"""Early-exit drafts: the target's own first layers, then its final norm and head.

The draft shares every weight with the target; nothing is trained and nothing is copied. As recorded and decoded here
it is a model of its own with its own cache, so the measured times are real: a draft step of $\ell$ of $L$ layers, and
a verification that runs all $L$ again.

Systems built for it keep the shallow layers' states. Kangaroo runs the shallow layers once more for the last candidate
and then only the other $L - \ell$ layers on all positions; DEL counts alike. In units of one target pass a round of
$k$ candidates takes
$$T(k) = (k + 1)\frac{\ell}{L} + k\,\epsilon + \frac{L - \ell}{L} = k\Big(\frac{\ell}{L} + \epsilon\Big) + 1,$$
with $\epsilon$ the adapter's (Kangaroo) or head's share. `shared_states_cost` is that round as a declared cost: what
re-use would earn, not what was measured here.

References:
    Liu et al., *Kangaroo* (2404.18911), and `evaluation/inference_kangaroo.py`; *DEL* (2504.05598), its denominator
    $(L - e) + (k + 1) e$ in our symbols.
"""

import copy
from typing import Any

from mdp.cost import Affine

__all__ = ["early_exit", "num_layers", "shared_states_cost"]


def num_layers(model: Any) -> int:
    """How many layers a decoder has.

    Raises:
        ValueError: if it does not keep them as `layers`, followed by `norm` (Llama, Mistral, Qwen and their kin do).
    """
    trunk = model.base_model
    if not hasattr(trunk, "layers") or not hasattr(trunk, "norm"):
        raise ValueError(f"draft: exit needs a decoder with .layers and .norm, which {type(model).__name__} is not")
    return len(trunk.layers)


def early_exit(model: Any, layers: int) -> Any:
    """A causal language model of the first `layers` of `model`, its norm and its head; tensors are shared.

    Raises:
        ValueError: if the model has no more layers than that.
    """
    total = num_layers(model)
    if not 1 <= layers < total:
        raise ValueError(f"draft: exit:layers={layers}: the target has {total} layers, so choose from 1..{total - 1}")
    # A deep copy that stops at the tensors: modules and settings are the draft's own, weights are not.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    draft = copy.deepcopy(model, memo=shared)
    draft.base_model.layers = draft.base_model.layers[:layers]
    draft.config.num_hidden_layers = layers
    if getattr(draft.config, "layer_types", None):
        draft.config.layer_types = list(draft.config.layer_types)[:layers]
    return draft


def shared_states_cost(
    layers: int, total: int, *, adapter_time: float = 0.0, head_time: float = 0.0, verify_slope: float = 0.0
) -> Affine:
    r"""The declared cost of an early exit whose verification re-uses the shallow states, in target passes.

    With $h$ the head's share of a target pass and $s$ what each further position adds to one,
    $t_d = (1 - h)\ell/L + h + \epsilon$ and $V(k) = 1 + s(1 - \ell/L)k$: the shallow layers have read the candidates
    already. With $h = s = 0$ this is Kangaroo's and DEL's count.

    Args:
        layers, total: $\ell$ and $L$.
        adapter_time: $\epsilon$, extra time of a draft step.
        head_time: $h$, in [0, 1).
        verify_slope: $s$.

    Raises:
        ValueError: if `layers` is not in 1..total - 1, `head_time` not in [0, 1) or a time negative.

    Example:
        >>> shared_states_cost(8, 32)
        Affine(draft_time=0.25, verify_time=1.0, verify_slope=0.0)
    """
    if not 1 <= layers < total:
        raise ValueError(f"layers must be a whole number in 1..{total - 1}, got {layers!r}")
    if not 0 <= head_time < 1:
        raise ValueError(f"head_time must be a number in [0, 1), got {head_time!r}")
    if adapter_time < 0:
        raise ValueError(f"adapter_time must be a number >= 0, got {adapter_time!r}")
    shallow = layers / total
    return Affine((1 - head_time) * shallow + head_time + adapter_time, 1.0, verify_slope * (1 - shallow))

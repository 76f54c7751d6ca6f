r"""The acceptance prediction head of SpecDec++: how likely is it that the target accepts a drafted token?

*Network* (Huang et al. 2024, arXiv 2405.19715, as released): D residual blocks $x + \mathrm{SiLU}(Wx + b)$ on the
draft's last hidden state and a linear layer to two logits, the second for "accept". The released code repeats one
block D times, so its D blocks share their weights (`shared_blocks=True`, the default).

*Variants.* `published` reads the state *after* the candidate, which the draft reaches only while it drafts the next
one: its scores come one candidate late (`lag` 1). `matched` reads the state that the candidate's law came from, with
the candidate's draft probability and the entropy: no lag.

*Bias* (theory, F6). With weight w on rejections the trained output is $y = m/(m + w(1 - m))$ where acceptance has
probability m, so $\mathrm{logit}(m) = \mathrm{logit}(y) + \ln w$: one shift of the logits, which `score` makes unless
told otherwise.

*Files.* A head is a folder: `model.safetensors` and `config.json` {hidden_size, num_layers} as PyTorchModelHubMixin
writes them (`model.0.linear.weight`, ..., `model.D.weight`; blocks that are shared are stored once), and our
`manifest.json` with variant, weight, lag, inputs, provenance and metrics. Published folders have none: theirs are
scores as they are, with lag 1. Where inputs are standardised, `input.mean` and `input.scale` are stored beside the
weights; the released class cannot load those, and `published` heads hold none.
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdp.trace import Trace
from realmodels.pair import check_same_models
from realmodels.sight import LIVE

__all__ = [
    "LAGS", "VARIANTS", "AcceptanceHead", "Head", "apply_head", "check_out", "following",
    "load_head", "save_head",
]  # fmt: skip

SCHEMA_VERSION = 1
VARIANTS = {"published": ("hidden",), "matched": ("hidden", "draft_prob", "entropy")}
"""What each variant reads."""
LAGS = {"published": 1, "matched": 0}

MAX_WIDTH, MAX_LAYERS = 2**16, 64
MAX_JSON_BYTES, MAX_WEIGHT_BYTES = 2**20, 4 * 2**30
ROWS = 8192  # scored at a time
_BLOCK_KEY = re.compile(r"model\.([0-9]{1,3})\.linear\.(weight|bias)")


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """`num_layers` residual blocks, one if they are shared, and a linear layer to 2 logits; index 1 is "accept"."""

    def __init__(self, hidden_size: int, num_layers: int, shared_blocks: bool = True):
        super().__init__()
        count = min(num_layers, 1) if shared_blocks else num_layers
        blocks = [ResidualBlock(hidden_size) for _ in range(count)]
        if shared_blocks:
            blocks = blocks * num_layers
        self.hidden_size, self.num_layers, self.shared_blocks = hidden_size, num_layers, shared_blocks
        self.model = nn.Sequential(*blocks, nn.Linear(hidden_size, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@dataclass(frozen=True, eq=False)
class Head:
    """A head and what it was made for.

    Attributes:
        module: the network, in float32.
        mean, scale: [width] of the inputs, which are standardised by them; None: they are read as they are.
        manifest: as in `manifest.json`; `{}` of what is not known.
        debias: whether `score` undoes the weight on rejections.
    """

    module: AcceptanceHead
    mean: Tensor | None = None
    scale: Tensor | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    debias: bool = True

    @property
    def variant(self) -> str:
        return self.manifest.get("variant", "published")

    @property
    def lag(self) -> int:
        """How many candidates late a score is known: 1 if the state after the candidate tells it."""
        return self.manifest.get("lag", LAGS[self.variant])

    @property
    def inputs(self) -> tuple[str, ...]:
        """`hidden`, and the features of the candidate that follow it."""
        return tuple(self.manifest.get("inputs", VARIANTS[self.variant]))

    @property
    def rejection_weight(self) -> float:
        """w of the training loss; 1 if it is not known, so that outputs are used as they are."""
        return float(self.manifest.get("rejection_weight") or 1.0)

    @property
    def width(self) -> int:
        """Size of the draft's hidden state."""
        return self.module.hidden_size - (len(self.inputs) - 1)

    def accept_logit(self, x: Tensor) -> Tensor:
        """Log-odds of acceptance [...] as trained (biased) from inputs [..., hidden_size], not standardised."""
        if self.mean is not None and self.scale is not None:
            x = (x - self.mean) / self.scale
        logits = self.module(x)
        return logits[..., 1] - logits[..., 0]

    def score(self, hidden: Tensor, features: Mapping[str, Tensor] | None = None) -> Tensor:
        """Predicted acceptance probability [...] of candidates.

        Args:
            hidden: [..., width]. Lag 0: the state that the candidate's law came from. Lag 1: the state after it.
            features: the candidate's own, [...] each; those in `inputs` are read.

        Raises:
            ValueError: if the width is another one, or a feature is missing.
        """
        if hidden.shape[-1] != self.width:
            raise ValueError(f"head: it reads states of {self.width} numbers, this draft's have {hidden.shape[-1]}")
        device = next(self.module.parameters()).device  # the draft may live on another one
        columns = [hidden.to(device).float()]
        for name in self.inputs[1:]:
            if features is None or name not in features:
                raise ValueError(f"head: it reads {name}, which is not given")
            columns.append(features[name].to(device).float()[..., None])
        logit = self.accept_logit(torch.cat(columns, -1))
        return torch.sigmoid(logit + np.log(self.rejection_weight) * self.debias)


@torch.inference_mode()
def apply_head(head: Head, trace: Trace, debias: bool = True) -> Trace:
    """The trace with columns `head` and `rollout_head`: the predicted acceptance probability of each drafted token.

    Scores are those of the candidates themselves whatever the lag; that they come late is written into the manifest
    (`Trace.head_lag`), and replay shows them late. Where the state after a candidate was not recorded they are nan.

    Raises:
        ValueError: if the trace has no hidden states, or another pair recorded it.
    """
    hidden, rolled = trace.optional.get("hidden"), trace.optional.get("rollout_hidden")
    if hidden is None or (rolled is None and trace.rollout_offsets is not None):
        where = "" if hidden is None else " along its rollouts"
        raise ValueError(f"trace: it holds no hidden states{where}; record it with --hidden")
    if head.manifest.get("models"):
        check_same_models(head.manifest["models"], trace.manifest.get("models"), "the trace", "the head's")
    head = replace(head, debias=debias)
    if rolled is None:
        rolled = hidden[:0]
    states = np.concatenate([hidden, rolled])
    features = {name: np.concatenate([trace.features[name], trace.rollout_features.get(name, rolled[:, 0])])
                for name in head.inputs[1:]}  # fmt: skip
    at = np.arange(len(states)) if head.lag == 0 else following(trace)
    out = np.full(len(states), np.nan, dtype=np.float32)
    known = np.flatnonzero(at >= 0)
    for part in np.array_split(known, max(1, -(-len(known) // ROWS))):
        given = {name: torch.from_numpy(values[part]) for name, values in features.items()}
        out[part] = head.score(torch.from_numpy(states[at[part]]), given).numpy()
    about = {"lag": head.lag, "variant": head.variant, "rejection_weight": head.rejection_weight, "debiased": debias}
    columns = {"head": out[: trace.num_positions]}
    if trace.rollout_offsets is not None:
        columns["rollout_head"] = out[trace.num_positions :]
    return replace(trace, optional={**trace.optional, **columns}, manifest={**trace.manifest, "head": about})


def following(trace: Trace) -> np.ndarray:
    """For each position, then each rollout step: where the state after its candidate stands in that order, or -1."""
    count = trace.num_positions
    inner = np.ones(count, dtype=bool)
    inner[trace.offsets[1:] - 1] = False
    after = np.where(trace.accepted & inner, np.arange(count) + 1, -1)
    if trace.rollout_offsets is None:
        return after
    first, end = trace.rollout_offsets[:-1], trace.rollout_offsets[1:]
    after = np.where(end > first, count + first, after)
    total = int(trace.rollout_offsets[-1])
    steps = count + np.arange(total) + 1
    steps[end[end > first] - 1] = -1
    return np.concatenate([after, steps])


def save_head(head: Head, out: str | Path, beside: Mapping[str, Any] | None = None) -> Path:
    """Write the folder: all of it or nothing; the same head gives the same bytes.

    `beside`: further files of it, name -> what goes in as JSON.

    Raises:
        ValueError: if `out` is there already and is not an empty folder.
    """
    from safetensors.torch import save as to_bytes

    out = Path(out)
    check_out(out)
    module = head.module
    # A shared block is stored once, under its first name; the released module's loader knows the others to be it.
    tensors = {
        key: value.detach().contiguous().float()
        for key, value in module.state_dict().items()
        if not (module.shared_blocks and (match := _BLOCK_KEY.fullmatch(key)) and int(match[1]) > 0)
    }
    for name in ("mean", "scale"):
        if getattr(head, name) is not None:
            tensors[f"input.{name}"] = getattr(head, name).contiguous()
    data = to_bytes(tensors, metadata={"format": "pt"})  # several entries would come in any order
    config = {"hidden_size": module.hidden_size, "num_layers": module.num_layers}
    manifest = {
        "schema_version": SCHEMA_VERSION, "variant": head.variant, "lag": head.lag, "inputs": list(head.inputs),
        "shared_blocks": module.shared_blocks, "rejection_weight": head.rejection_weight, **head.manifest,
        "model_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    # what cannot be written is found before anything is
    texts = {name: json.dumps(value, indent=1, allow_nan=False) for name, value in (beside or {}).items()}
    texts |= {"config.json": json.dumps(config), "manifest.json": json.dumps(manifest, indent=1, allow_nan=False)}
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    half.mkdir()
    try:
        (half / "model.safetensors").write_bytes(data)
        for name, text in texts.items():
            (half / name).write_text(text)
        half.replace(out)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return out


def check_out(out: Path) -> None:
    """Refuse a folder that a head cannot be written to.

    Raises:
        ValueError: if it is there and not empty, or is no folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out: {out} is there already and is not an empty folder")


def load_head(path: str | Path, shared_blocks: bool | None = None) -> Head:
    """Read a head: one of ours, or a published checkpoint without our manifest.

    Args:
        shared_blocks: whether all blocks are one; None: what the manifest says, else what the weights say (they are one
            if the file holds one, or the same one under all names).

    Raises:
        ValueError: one line that names the file and the fault.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: not a head (a folder with config.json and model.safetensors)")
    config = _read_json(path / "config.json", {"hidden_size": (1, MAX_WIDTH), "num_layers": (0, MAX_LAYERS)})
    width, layers = config["hidden_size"], config.get("num_layers", 0)
    manifest = _manifest(path / "manifest.json") if (path / "manifest.json").exists() else {}
    file = path / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file}: missing (weights are read as safetensors only)")
    if file.stat().st_size > MAX_WEIGHT_BYTES:
        raise ValueError(f"{file}: larger than {MAX_WEIGHT_BYTES} bytes")
    data = file.read_bytes()
    if manifest and hashlib.sha256(data).hexdigest() != manifest.get("model_sha256"):
        raise ValueError(f"{file}: damaged (its hash is not the manifest's)")
    try:
        tensors = from_bytes(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a safetensors file ({error})") from error
    mean, scale = (tensors.pop(f"input.{name}", None) for name in ("mean", "scale"))
    shapes = {"weight": (width, width), "bias": (width,)}
    wanted = {f"model.{i}.linear.{part}": shape for i in range(layers) for part, shape in shapes.items()}
    wanted |= {f"model.{layers}.weight": (2, width), f"model.{layers}.bias": (2,)}
    first = {key: f"model.0.linear.{key.rpartition('.')[2]}" for key in wanted if _BLOCK_KEY.fullmatch(key)}
    lacking = [key for key in wanted if key not in tensors]
    if any(key not in first or first[key] not in tensors for key in lacking):
        raise ValueError(f"{file}: lacks {next(k for k in lacking if first.get(k) not in tensors)}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{file}: holds {unknown[0]!r:.60}, which config.json's num_layers has no place for")
    for key, value in [*tensors.items(), ("input.mean", mean), ("input.scale", scale)]:
        if value is not None and tuple(value.shape) != wanted.get(key, (width,)):
            raise ValueError(f"{file}: {key} must have shape {wanted.get(key, (width,))}, got {tuple(value.shape)}")
        if value is not None and not (value.is_floating_point() and torch.isfinite(value).all()):
            raise ValueError(f"{file}: {key} must hold finite numbers")
    one = all(torch.equal(tensors[key], tensors[first[key]]) for key in first if key in tensors)
    asked = manifest.get("shared_blocks") if shared_blocks is None else shared_blocks
    shared = one if asked is None else bool(asked)
    if shared and not one:
        raise ValueError(f"{file}: its blocks differ, so they are not shared")
    with torch.device("meta"):
        module = AcceptanceHead(width, layers, shared)
    state = {key: tensors[key if key in tensors else first[key]].float() for key in wanted}
    module.load_state_dict(state, assign=True)
    head = Head(module.eval().requires_grad_(False), mean, scale, manifest)
    if head.width < 1:
        raise ValueError(f"{path}: hidden_size {width} is too small for its inputs {', '.join(head.inputs)}")
    return head


def _read_json(path: Path, numbers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing (a head is a folder with config.json and model.safetensors)")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be an object")
    for name, (low, high) in numbers.items():
        value = values.get(name, low)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{path}: {name} must be a whole number in {low}..{high}, got {value!r:.60}")
    if "hidden_size" in numbers and "hidden_size" not in values:
        raise ValueError(f"{path}: hidden_size is missing")
    return values


def _manifest(path: Path) -> dict[str, Any]:
    values = _read_json(path, {"schema_version": (SCHEMA_VERSION, SCHEMA_VERSION), "lag": (0, 1)})
    variant, inputs, weight = (values.get(name) for name in ("variant", "inputs", "rejection_weight"))
    if variant not in VARIANTS:
        raise ValueError(f"{path}: variant must be one of {', '.join(VARIANTS)}, got {variant!r:.60}")
    known = isinstance(inputs, list) and inputs[:1] == ["hidden"] and all(name in LIVE for name in inputs[1:])
    if not known:
        raise ValueError(f"{path}: inputs must be hidden, then some of {', '.join(LIVE)}, got {inputs!r:.60}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise ValueError(f"{path}: rejection_weight must be a number in (0, 1e6), got {weight!r:.60}")
    if not isinstance(values.get("models", {}), dict):
        raise ValueError(f"{path}: models must be an object")
    return values

"""The pair that a command line names; every verb with `--target` and `--draft` loads it here."""

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realmodels.pair import ModelPair

__all__ = ["LOADING", "load_pair_from", "need", "pair_options", "sampling"]

LOADING = ("dtype", "device", "device_map", "quantise", "target_revision", "draft_revision", "trust_remote_code")
"""How models are loaded, as arguments of `realmodels.pair.load_pair`."""


def pair_options(args: Namespace) -> dict[str, Any]:
    """What was typed of `realmodels.pair.load_pair`'s arguments, plain values that another process can be sent."""
    return {name: getattr(args, name) for name in ("target", "draft", *LOADING)}


def load_pair_from(args: Namespace) -> "ModelPair":
    """The pair of `--target` and `--draft`, loaded as the other flags say."""
    from realmodels.pair import load_pair

    return load_pair(**pair_options(args))


def sampling(args: Namespace) -> dict[str, Any]:
    """What was typed of `realmodels.sampling.Sampling`, checked."""
    from realmodels.sampling import Sampling

    return asdict(Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__}))


def need(args: Namespace, *names: str) -> None:
    """Refuse a command line without these options, in the parser's own words."""
    if lacking := [f"--{name}" for name in names if getattr(args, name) is None]:
        raise ValueError(
            f"the following arguments are required: {', '.join(lacking)} (see specstop {args.verb} --help)"
        )

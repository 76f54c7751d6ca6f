"""The pair and the prompts that a command line names; every verb with `--target` and `--draft` loads them here."""

from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realmodels.pair import ModelPair

__all__ = ["load_pair_from"]

OPTIONS = ("dtype", "device", "device_map", "quantise", "target_revision", "draft_revision", "trust_remote_code")


def load_pair_from(args: Namespace) -> "ModelPair":
    """The pair of `--target` and `--draft`, loaded as the other flags say."""
    from realmodels.pair import load_pair

    return load_pair(args.target, args.draft, **{name: getattr(args, name) for name in OPTIONS})

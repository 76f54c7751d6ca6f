"""What the process is set to when it is ours: the command line's, never a library's.

Environment variables are set before jax or transformers is imported; those the user has set win.
"""

import os
import sys
import warnings
from pathlib import Path

from realmodels.gguf_file import cache_folder

__all__ = ["compilation_cache", "prepare"]


def prepare() -> None:
    """Keep stderr clean and let compiled programs outlive the process."""
    if not sys.warnoptions:
        # A warning is no part of "exactly one line on stderr"; `python -W default -m specstop` shows them.
        warnings.simplefilter("ignore")
    defaults = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # Waiting threads sleep: spinning ones cost a busy machine several times the work itself.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not sys.stderr.isatty():
        defaults["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if folder := compilation_cache():
        defaults["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # Each program is small and quick to compile; together they are most of a short run.
        defaults["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        defaults["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def compilation_cache() -> Path | None:
    """A folder for compiled programs, made if need be; None if there is no place for one."""
    try:
        folder = cache_folder() / "jax"
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError, ValueError):
        return None  # no home, a read-only one, or a path that cannot be one

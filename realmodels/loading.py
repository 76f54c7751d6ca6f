"""One model from a folder, a GGUF file or a hub id: what is loaded, from where, and what is refused.

* Weights are safetensors. Pickles are refused by name and by content: a renamed pickle is no safetensors file.
* A hub id is the only source that needs a network. Its revision is resolved to a commit once; configuration, weights
  and tokenizer are read at that commit, and it goes into the manifest.
* A model's own code runs only with `trust_remote_code`, which says on stderr whose code it is, at which commit.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from realmodels.gguf_file import BUNDLED_PACKAGE, converted, file_digest, find_gguf
from realmodels.reader import check_attention

__all__ = ["DTYPES", "QUANTISED", "Loading", "check_spec", "load_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = ("4bit", "8bit")
SOURCES = "bundled, gguf:PACKAGE, gguf:FILE.gguf, tiny[:SEED], a model folder or a hub id such as org/name"
MAX_INDEX_BYTES = 64 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    Attributes:
        dtype: of weights and activations, one of `DTYPES`.
        device: where a model lives, such as `cpu` or `cuda:0`; not read beside `device_map`.
        device_map: `auto` spreads layers over all devices there are (accelerate).
        quantise: `4bit` or `8bit` weights (bitsandbytes); None leaves them as they are.
        trust_remote_code: run the Python code that comes with a model.
    """

    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None
    quantise: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: choose from {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device_map not in (None, "auto"):
            raise ValueError(f"device_map: must be auto, got {self.device_map!r}")
        if self.quantise not in (None, *QUANTISED):
            raise ValueError(f"quantise: choose from {', '.join(QUANTISED)}, got {self.quantise!r}")
        with _foreign(f"device: cannot use {self.device!r:.60}"):
            torch.empty(0, device=self.device)
        for field, package in (("device_map", "accelerate"), ("quantise", "bitsandbytes")):
            if getattr(self, field) is not None and find_spec(package) is None:
                raise ValueError(f"{field}: needs {package}, which is not installed; try: pip install {package}")

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        options: dict[str, Any] = {"dtype": DTYPES[self.dtype], "use_safetensors": True}
        if self.device_map is not None:
            options["device_map"] = self.device_map
        if self.quantise is not None:
            from transformers import BitsAndBytesConfig

            bits: dict[str, Any] = {"load_in_8bit": True}
            if self.quantise == "4bit":
                bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": DTYPES[self.dtype]}
            options["quantization_config"] = BitsAndBytesConfig(**bits)
            options.setdefault("device_map", {"": self.device})
        return options


def check_spec(spec: str, role: str, revision: str | None) -> None:
    """Refuse, before anything is loaded, what names no source of a model, or a revision of what has none.

    Raises:
        ValueError: one line that names the model and what is allowed.
    """
    local = spec == "bundled" or spec.startswith("gguf:") or Path(spec).is_dir()
    if not local and not _HUB_ID.fullmatch(spec):
        made = "" if role == "target" else "rtn:bits=B,group=G, exit:layers=N, lookup:ngram=N, "
        raise ValueError(f"{role}: unknown model {spec!r}; choose from {made}{SOURCES}")
    if local and revision is not None:
        raise ValueError(f"{role}_revision: {spec!r} is no hub id, it has no revisions")


def load_model(spec: str, role: str, loading: Loading, revision: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer (None if it has none) and provenance of what `check_spec` lets pass.

    Raises:
        ValueError: one line that names the model, what was given and what is allowed.
    """
    about: dict[str, Any] = {"spec": spec, "name": spec, "revision": None}
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    source = spec
    if spec == "bundled" or spec.startswith("gguf:"):
        path = find_gguf(BUNDLED_PACKAGE if spec == "bundled" else spec.removeprefix("gguf:"))
        digest = file_digest(path)
        about |= {"name": path.stem, "sha256": {path.name: digest}}
        with _foreign(f"gguf: cannot convert {path}"), _quiet():
            source = str(converted(path, digest))
    else:
        if Path(spec).is_dir():
            about |= {"name": Path(spec).resolve().name, "sha256": _folder_digests(Path(spec), role)}
            config = Path(spec) / "config.json"
        else:
            config = _fetch_config(spec, role, revision)
            about["revision"] = config.parent.name
            options = {"revision": about["revision"], "trust_remote_code": False}
        if loading.trust_remote_code:
            _check_code(config, role, spec)
            about["trust_remote_code"] = options["trust_remote_code"] = True
            print(f"specstop: running the model's own code: {spec} at {about['revision'] or spec}", file=sys.stderr)
    if loading.quantise is not None:
        about["quantise"] = loading.quantise
    with _quiet():
        model, tokenizer = _from_pretrained(source, spec, role, loading, options)
    return model, tokenizer, about


def _from_pretrained(source: str, spec: str, role: str, loading: Loading, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    with _foreign(f"{role}: cannot load {spec!r}"):
        model, report = loader.from_pretrained(source, output_loading_info=True, **loading.options, **options)
    # Weights that the files lack would be drawn at random, and everything recorded with them would be noise.
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{role}: {spec!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}")
    check_attention(model, f"{role} {spec!r}")
    try:
        with _foreign("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except ValueError:
        tokenizer = None  # prompts as token ids still work
    placed = "device_map" in loading.options
    return (model if placed else model.to(loading.device)).eval(), tokenizer


def _folder_digests(folder: Path, role: str) -> dict[str, str]:
    """SHA-256 of each weight file; a folder whose weights are not safetensors is refused."""
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles and not files:
            raise ValueError(f"{role}: {folder}: its weights are pickled ({pickles[0]}), only .safetensors are read")
        raise ValueError(f"{role}: {folder}: not a model folder (needs config.json and .safetensors files)")
    index = folder / "model.safetensors.index.json"
    named = _shards(index, role) if index.is_file() else []
    # A hub cache links its files to blobs, so links are followed; what they lead to must be a file.
    for name in (*named, *(path.name for path in files)):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{role}: {index}: a shard must be a .safetensors file in the folder, got {name!r:.100}")
        if not (folder / name).is_file():
            raise ValueError(f"{role}: {folder / name}: shard is missing")
    return {path.name: file_digest(path) for path in files}


def _shards(index: Path, role: str) -> list[str]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{role}: {index}: larger than {MAX_INDEX_BYTES} bytes")
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{role}: {index}: not an index of shards") from error


def _fetch_config(spec: str, role: str, revision: str | None) -> Path:
    """The configuration file of a hub id; its folder's name is the commit that the revision (or main) stands for.

    The cache keeps each file as `snapshots/COMMIT/NAME`, so this works without a network too where it is cached.
    """
    from huggingface_hub import hf_hub_download

    with _foreign(f"{role}: cannot find {spec!r} at revision {revision or 'main'!r}"), _quiet():
        config = Path(hf_hub_download(spec, "config.json", revision=revision))
    if not re.fullmatch(r"[0-9a-f]{40}", config.parent.name):
        raise ValueError(f"{role}: {spec!r}: cannot tell which commit {revision or 'main'!r} is")
    return config


def _check_code(config: Path, role: str, spec: str) -> None:
    """Refuse code that a configuration takes from another repository: no revision of ours pins it."""
    with _foreign(f"{role}: cannot load {spec!r}"):
        named = json.loads(config.read_text()).get("auto_map", {}).values()
    for name in named:
        for part in name if isinstance(name, list) else [name]:
            repository, dashes, _ = str(part).rpartition("--")
            if dashes:
                whose = f"its code is another repository's, {repository}"
                raise ValueError(f"{role}: {spec!r}: {whose}, which cannot be pinned")


@contextlib.contextmanager
def _foreign(what: str) -> Iterator[None]:
    """Turn whatever other people's code raises over a model's files into one line.

    A damaged file comes out as anything (SafetensorError, RuntimeError, ZeroDivisionError, ...), and which it is
    changes with versions. A package that is missing and memory that is short are no faults of the file.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and logs of other people's code unless someone watches; what goes wrong is raised anyhow."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield

"""Where results of `specstop figures` are kept, and when they are too old to be used again.

A result carries a *key*: the SHA-256 of what it is made from, which is its settings, the code it runs through and the
keys of what it uses in turn (of a trace: its manifest, which holds the hashes of the shards). A stored result with the
same key is the same result. The code that draws and writes pages is in no key: restyling recomputes nothing.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from inspect import getsourcefile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from specstop.figures.recipe import Data, Recipe, Unavailable
from specstop.output import jsonable, write_file

if TYPE_CHECKING:
    from mdp.trace import Trace

__all__ = ["Source", "Store"]

ROOT = Path(__file__).parents[2]
CODE = ("mdp/**/*.py", "mdp/counterexamples/*.json", "simulate/*.py", "specstop/*.py", "specstop/figures/sources.py")
LIVE_CODE = "realmodels/*.py"
RECIPE_CODE = "specstop/figures/recipe.py"
NO_RESULT = ("cli.py", "verbs.py", "report.py", "output.py", "check.py", "referee.py")  # parse and print, no numbers


class Source(NamedTuple):
    """A result that several figures share; `live` ones run models, and their times differ from run to run."""

    name: str
    uses: tuple[str, ...]
    compute: Callable[["Store"], Data]
    live: bool = False


@cache
def _code(pattern: str) -> str:
    """One hash of all files of a pattern."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.glob(pattern)):
        if not (path.parent.name == "specstop" and path.name in NO_RESULT):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Store:
    """Results of one folder, computed when they are first asked for.

    Args:
        out: the folder of the figures; shared results go into `out/data`.
        sources: what can be asked for, by name.
        quick: small sizes everywhere, and a tiny random pair.
        force: compute again what is there.
        trace: folder of a recorded trace; None records one (`sources`).
    """

    def __init__(
        self, out: Path, sources: Mapping[str, Source], *, quick: bool, force: bool = False, trace: Path | None = None
    ) -> None:
        self.out, self.sources, self.quick, self.force, self.given = out, sources, quick, force, trace
        self.reused: list[str] = []
        self._kept: dict[str, Data | Unavailable] = {}
        self._keys: dict[str, str] = {}

    @cached_property
    def trace_folder(self) -> Path:
        """The trace that everything real is computed from; recorded first if none was given."""
        from specstop.figures.sources import recorded_trace

        return recorded_trace(self)

    @property
    def trace_read(self) -> str | None:
        """The trace's folder, if anything asked for it."""
        return str(self.trace_folder) if "trace_folder" in vars(self) else None

    @cached_property
    def trace(self) -> "Trace":
        from mdp.trace import load

        return load(self.trace_folder)

    def get(self, name: str) -> Data:
        """A shared result.

        Raises:
            Unavailable: if it cannot be had here; remembered, so that nothing expensive is tried twice.
        """
        if name not in self._kept:
            path, source = self.out / "data" / f"{name}.json", self.sources[name]
            try:
                self._kept[name] = self._stored(path, self.key(name), name, source.compute)
            except Unavailable as missing:
                self._kept[name] = missing
        found = self._kept[name]
        if isinstance(found, Unavailable):
            raise found
        return found

    def data(self, recipe: Recipe) -> tuple[Data, bool]:
        """A figure's data, and whether it was there already.

        Raises:
            Unavailable: if a source it needs cannot be had.
        """
        path = self.out / f"{recipe.name}.json"
        code = _code(Path(getsourcefile(recipe.compute) or "").relative_to(ROOT).as_posix())
        key = self._hash(recipe.name, _code_of(False), _code(RECIPE_CODE), code, *map(self.key, recipe.uses))

        def compute(store: Store) -> Data:
            made = recipe.compute(store)
            data = {"name": recipe.name, "title": recipe.title, "caption": "", "quick": store.quick, **made}
            data = jsonable(data)
            return data | {"caption": recipe.caption(data)}

        return self._stored(path, key, recipe.name, compute), recipe.name in self.reused

    def key(self, name: str) -> str:
        """What a source is made from, as one hash."""
        if name not in self._keys:
            if name == "trace":
                made_from = [hashlib.sha256((self.trace_folder / "manifest.json").read_bytes()).hexdigest()]
            else:
                source = self.sources[name]
                made_from = [_code_of(source.live), *map(self.key, source.uses)]
            self._keys[name] = self._hash(name, *made_from)
        return self._keys[name]

    def _hash(self, *parts: str) -> str:
        return hashlib.sha256(json.dumps([self.quick, *parts]).encode()).hexdigest()

    def _stored(self, path: Path, key: str, name: str, compute: Callable[["Store"], Data]) -> Data:
        if not self.force and path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = None  # not ours, or half a file of another program's: made again
            if isinstance(found, dict) and found.get("key") == key:
                self.reused.append(name)
                return found
        if sys.stderr.isatty():
            print(f"computing {name}", file=sys.stderr, flush=True)
        made = {"key": key, **jsonable(compute(self))}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(made, allow_nan=False) + "\n")
        return made


def _code_of(live: bool) -> str:
    return "".join(map(_code, (*CODE, LIVE_CODE) if live else CODE))

"""Loading: what reaches `from_pretrained`, what is pinned, what is refused: pickles, code, a network unasked for."""

import json
import pickle
import shutil
import socket
import sys
import types

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from realmodels import loading  # noqa: E402
from realmodels.loading import Loading  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.tiny import tiny_target  # noqa: E402
from specstop.cli import main  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    tiny_target(3).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "small")


@pytest.fixture
def offline(monkeypatch):
    """A machine on which opening a connection, or asking for an address, fails the test."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


class Fetched:
    """Stands for transformers' loaders: notes the keywords and loads the small model in the id's place."""

    def __init__(self, folder, monkeypatch):
        import transformers

        self.folder, self.calls = folder, []
        self.real = transformers.AutoModelForCausalLM.from_pretrained
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", self.model)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", self.tokenizer)

    def model(self, source, **options):
        self.calls.append((source, options))
        keep = {key: options[key] for key in ("dtype", "output_loading_info", "use_safetensors")}
        return self.real(self.folder, **keep, local_files_only=True)

    def tokenizer(self, source, **options):
        self.calls.append((source, options))
        raise OSError("none")


@pytest.fixture
def fetched(saved, tmp_path, monkeypatch):
    """A hub with one model, `org/model`, whose main branch is at `COMMIT`."""
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(saved / "config.json", snapshot)
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    out = Fetched(saved, monkeypatch)
    out.asked = asked
    return out


def test_a_hub_id_is_pinned_to_its_commit(fetched):
    pair = load_pair("org/model", "org/draft", target_revision="v2", dtype="bfloat16")
    assert fetched.asked == [("org/model", "config.json", "v2"), ("org/draft", "config.json", None)]
    assert {role: about["revision"] for role, about in pair.provenance.items()} == {"target": COMMIT, "draft": COMMIT}
    for source, options in fetched.calls:
        assert source in ("org/model", "org/draft")
        assert options["revision"] == COMMIT and options["trust_remote_code"] is False
    model = fetched.calls[0][1]
    assert model["dtype"] is torch.bfloat16 and model["use_safetensors"] is True and "device_map" not in model
    assert pair.target.dtype is torch.bfloat16 and "trust_remote_code" not in pair.provenance["target"]


def test_flags_of_a_large_pair_reach_the_loader(fetched, monkeypatch, capsys):
    import transformers

    monkeypatch.setattr(loading, "find_spec", lambda name: name in ("bitsandbytes", "accelerate"))
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda **bits: bits)
    load_pair("org/model", "org/draft", device_map="auto", quantise="4bit", dtype="bfloat16")
    options = fetched.calls[0][1]
    assert options["device_map"] == "auto"
    assert options["quantization_config"] == {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    pair = load_pair("org/model", "lookup", quantise="8bit", trust_remote_code=True)
    options = fetched.calls[-2][1]
    assert options["device_map"] == {"": "cpu"} and options["quantization_config"] == {"load_in_8bit": True}
    assert options["trust_remote_code"] is True and pair.provenance["target"]["trust_remote_code"] is True
    assert pair.provenance["target"]["quantise"] == "8bit"
    assert f"the model's own code: org/model at {COMMIT}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'rtn' rounds weights that are not quantised yet"):
        load_pair("org/model", "rtn", quantise="4bit")


def test_layers_spread_over_devices_decode_as_they_do_on_one(saved):
    from mdp.policy import FixedLength
    from realmodels.decode import decode

    options = {"max_candidates": 3, "max_new_tokens": 12, "temperature": 0}
    alone, spread = (load_pair(str(saved), "exit:layers=1", device_map=m) for m in (None, "auto"))
    runs = [decode(pair, [4, 5], FixedLength(2), **options) for pair in (alone, spread)]
    assert runs[0].tokens == runs[1].tokens and runs[0].rounds == runs[1].rounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "4bit"}, "quantise: needs bitsandbytes, which is not installed"),
        ({"quantise": "2bit"}, "quantise: choose from 4bit, 8bit, got '2bit'"),
        ({"device_map": "all"}, "device_map: must be auto"),
        ({"device": "gpu7"}, "device: cannot use 'gpu7'"),
        ({"device_map": "auto"}, "device_map: needs accelerate, which is not installed"),
    ],
)
def test_bad_options_get_one_line(monkeypatch, options, message):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message) as error:
        Loading(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("role", "spec"), [("target", "tiny"), ("draft", "rtn"), ("draft", "FOLDER")])
def test_only_hub_ids_have_revisions(saved, role, spec):
    spec = str(saved) if spec == "FOLDER" else spec
    pair = {"target": str(saved), "draft": "lookup"} | {role: spec}
    with pytest.raises(ValueError, match=f"{role}_revision: .* it has no revisions"):
        load_pair(**pair, **{f"{role}_revision": "main"})


def test_a_draft_that_cannot_be_is_refused_before_the_target_is_loaded(fetched):
    for draft, message in (("nonesuch", "choose from rtn:bits=B,group=G, exit"), ("tiny", "a tiny target only")):
        with pytest.raises(ValueError, match=message):
            load_pair("org/model", draft)
    with pytest.raises(ValueError, match="'tiny' is loaded as it is"):
        load_pair("tiny", "lookup", device_map="auto")
    assert fetched.calls == fetched.asked == []


def test_nothing_but_a_hub_id_needs_a_network(offline, folder, tmp_path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(24)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w2").save_pretrained(folder)
    for draft in ("rtn:group=8", "exit:layers=1", "lookup", str(folder)):
        assert load_pair(str(folder), draft).tokenizer is not None
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"tokens": [4, 5]}\n')
    assert main(f"record --target {folder} --draft lookup --prompts {prompts} --out {tmp_path}/t "
                "--max-new-tokens 4 --max-candidates 2".split()) == 0  # fmt: skip
    assert offline == []


def test_the_blocked_network_is_noticed(offline, tmp_path, monkeypatch):
    """The test above can fail: a hub id does ask."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it would try again and again
    with pytest.raises(ValueError, match="target: cannot find 'org/nothing-of-this-name'") as error:
        load_pair("org/nothing-of-this-name", "lookup")
    assert "\n" not in str(error.value)
    assert offline


class Bomb:
    """What a pickle can do: importing this module's marker."""

    def __reduce__(self):
        return exec, ("import sys; sys.modules['exploded_pickle'] = sys",)


def only_pickles(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def renamed_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def link_to_pickle(folder):
    only_pickles(folder)
    (folder / "model.safetensors").symlink_to(folder / "pytorch_model.bin")


def link_to_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone.safetensors")


def index_to(name):
    def act(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

    return act


UNSAFE = {
    "pickles alone": (only_pickles, "its weights are pickled (pytorch_model.bin), only .safetensors are read"),
    "a renamed pickle": (renamed_pickle, "cannot load"),
    "a link to a pickle": (link_to_pickle, "cannot load"),
    "a link to nothing": (link_to_nothing, "model.safetensors: shard is missing"),
    "a pickled shard": (index_to("pytorch_model-1.bin"), "a shard must be a .safetensors file in the folder"),
    "a shard elsewhere": (index_to("../other.safetensors"), "a shard must be a .safetensors file in the folder"),
    "a shard that is gone": (index_to("gone.safetensors"), "gone.safetensors: shard is missing"),
    "no index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not an index of shards"),
}


@pytest.mark.parametrize(("act", "message"), UNSAFE.values(), ids=UNSAFE)
def test_weights_that_are_not_safetensors_are_refused(folder, act, message):
    act(folder)
    with pytest.raises(ValueError, match="target: ") as error:
        load_pair(str(folder), "lookup")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "exploded_pickle" not in sys.modules


def test_the_bomb_is_live():
    assert "exploded_pickle" not in sys.modules
    try:
        pickle.loads(pickle.dumps(Bomb()))
        assert "exploded_pickle" in sys.modules
    finally:
        sys.modules.pop("exploded_pickle", None)


def test_a_hub_caches_links_are_followed(saved, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in saved.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert load_pair(str(snapshot), "lookup").provenance["target"]["sha256"].keys() == {"model.safetensors"}


CODE = """
import sys, types
sys.modules["ran_model_code"] = types.ModuleType("ran_model_code")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder, monkeypatch, tmp_path):
    """A model folder that brings its own code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    yield folder
    sys.modules.pop("ran_model_code", None)


def test_a_models_own_code_is_not_run(with_code):
    with pytest.raises(ValueError, match="target: cannot load") as error:
        load_pair(str(with_code), "lookup")
    assert "\n" not in str(error.value) and "ran_model_code" not in sys.modules


def test_a_models_own_code_runs_if_trusted_and_says_so(with_code, capsys):
    pair = load_pair(str(with_code), "lookup", trust_remote_code=True)
    assert isinstance(sys.modules.get("ran_model_code"), types.ModuleType)
    assert pair.provenance["target"]["trust_remote_code"] is True
    assert f"the model's own code: {with_code} at {with_code}" in capsys.readouterr().err


def test_code_of_a_third_repository_cannot_be_pinned(with_code):
    config = json.loads((with_code / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "other/repo--own.Own"
    (with_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its code is another repository's, other/repo, which cannot be pinned"):
        load_pair(str(with_code), "lookup", trust_remote_code=True)

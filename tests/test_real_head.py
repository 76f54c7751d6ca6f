"""The acceptance head: the released forward pass and files, our folders, de-biasing."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heads import WIDTH, a_head  # noqa: E402
from safetensors.torch import load_model, save, save_file, save_model  # noqa: E402

import realmodels.head  # noqa: E402
from realmodels.head import load_head, save_head  # noqa: E402

torch.set_num_threads(1)

BLOCK, BIAS = [[1.0, -2.0], [0.5, 0.0]], [0.25, -1.0]
LAST, LAST_BIAS = [[1.0, 0.0], [-1.0, 3.0]], [0.5, 0.0]


def released(hidden_size, num_layers):
    """The published module as its layout implies it: a Sequential that holds one block `num_layers` times."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(hidden_size, hidden_size)

        def forward(self, x):
            return x + torch.nn.functional.silu(self.linear(x))

    whole = torch.nn.Module()
    whole.model = torch.nn.Sequential(*[Block()] * num_layers, torch.nn.Linear(hidden_size, 2))
    return whole


def checkpoint(folder, tensors, num_layers, hidden_size=2):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden_size, "num_layers": num_layers}))
    save_file({key: torch.tensor(value) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def by_hand(x, blocks):
    """Residual SiLU blocks and the last layer in NumPy."""
    for weight, bias in blocks:
        z = np.array(weight) @ x + np.array(bias)
        x = x + z / (1.0 + np.exp(-z))
    return np.array(LAST) @ x + np.array(LAST_BIAS)


def repeated(num_layers):
    tensors = {f"model.{i}.linear.weight": BLOCK for i in range(num_layers)}
    tensors |= {f"model.{i}.linear.bias": BIAS for i in range(num_layers)}
    return tensors | {f"model.{num_layers}.weight": LAST, f"model.{num_layers}.bias": LAST_BIAS}


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_repeated_keys_load_as_one_block_with_the_forward_pass_by_hand(tmp_path, num_layers):
    head = load_head(checkpoint(tmp_path / "head", repeated(num_layers), num_layers))
    assert head.module.shared_blocks and head.lag == 1 and head.rejection_weight == 1.0
    assert sum(p.numel() for p in head.module.parameters()) == 6 + 6 * min(num_layers, 1)
    x = np.array([0.3, -0.7])
    logits = by_hand(x, [(BLOCK, BIAS)] * num_layers)
    np.testing.assert_allclose(head.module(torch.tensor(x).float()).numpy(), logits, rtol=1e-5)
    accept = np.exp(logits[1]) / np.exp(logits).sum()  # index 1 is "accept"
    assert float(head.score(torch.tensor(x))) == pytest.approx(accept, rel=1e-5)
    if num_layers == 3:
        wrong = by_hand(x, [(BLOCK, BIAS)])  # the paper's text read as one layer
        assert abs(logits - wrong).max() > 0.1


def test_the_file_that_the_hub_mixin_writes_loads_and_ours_loads_there(tmp_path):
    """It stores a shared block once; strict loading there must find all it wants."""
    torch.manual_seed(0)
    theirs = released(5, 3)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"hidden_size": 5, "num_layers": 3}')
    save_model(theirs, str(tmp_path / "theirs" / "model.safetensors"))
    head, x = load_head(tmp_path / "theirs"), torch.randn(4, 5)
    torch.testing.assert_close(head.module(x), theirs.model(x))
    save_head(head, tmp_path / "ours")
    again = released(5, 3)
    load_model(again, str(tmp_path / "ours" / "model.safetensors"), strict=True)
    torch.testing.assert_close(again.model(x), theirs.model(x))
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == {"hidden_size": 5, "num_layers": 3}


def test_blocks_that_differ_are_not_shared(tmp_path):
    tensors = repeated(2) | {"model.1.linear.bias": [0.0, 0.0]}
    folder = checkpoint(tmp_path / "head", tensors, 2)
    head = load_head(folder)
    assert not head.module.shared_blocks
    x = np.array([1.0, 2.0])
    wanted = by_hand(x, [(BLOCK, BIAS), (BLOCK, [0.0, 0.0])])
    np.testing.assert_allclose(head.module(torch.tensor(x).float()).numpy(), wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="its blocks differ, so they are not shared"):
        load_head(folder, shared_blocks=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.2.weight": None}, "lacks model.2.weight"),
        ({"model.0.linear.weight": None, "model.1.linear.weight": None}, "lacks model.0.linear.weight"),
        ({"model.3.linear.weight": BLOCK}, "holds 'model.3.linear.weight'"),
        ({"model.2.bias": [0.0]}, "model.2.bias must have shape"),
        ({"model.2.bias": [0.0, float("nan")]}, "model.2.bias must hold finite numbers"),
        ({"model.2.bias": [0, 1]}, "model.2.bias must hold finite numbers"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, said):
    tensors = {key: value for key, value in (repeated(2) | change).items() if value is not None}
    with pytest.raises(ValueError, match=said):
        load_head(checkpoint(tmp_path / "head", tensors, 2))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "hidden_size is missing"),
        ('{"hidden_size": 2, "num_layers": 65}', "num_layers must be a whole number in 0..64, got 65"),
        ('{"hidden_size": 99999999}', "hidden_size must be a whole number in 1..65536"),
        ('{"hidden_size": true}', "hidden_size must be a whole number"),
    ],
)
def test_a_bad_config_is_named(tmp_path, config, said):
    folder = checkpoint(tmp_path / "head", repeated(2), 2)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=said):
        load_head(folder)


def test_pickles_large_and_damaged_files_are_refused(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "head", repeated(1), 1)
    file = folder / "model.safetensors"
    monkeypatch.setattr(realmodels.head, "MAX_WEIGHT_BYTES", 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        load_head(folder)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_head(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="read as safetensors only"):
        load_head(folder)
    with pytest.raises(ValueError, match="not a head"):
        load_head(tmp_path / "nowhere")


@pytest.mark.parametrize("variant", ["matched", "published"])
def test_a_head_comes_back_from_its_folder(tmp_path, variant):
    head = a_head(variant, rejection_weight=6.0)
    if variant == "matched":
        head = dataclasses.replace(head, mean=torch.randn(WIDTH + 2), scale=torch.rand(WIDTH + 2) + 0.5)
    folder = save_head(head, tmp_path / "head")
    again, x = load_head(folder), torch.randn(7, WIDTH)
    features = {"draft_prob": torch.rand(7), "entropy": torch.rand(7)}
    torch.testing.assert_close(head.score(x, features), again.score(x, features), rtol=0, atol=0)
    assert (again.variant, again.lag, again.inputs, again.rejection_weight) == (
        variant, head.lag, head.inputs, 6.0,
    )  # fmt: skip
    save_head(again, tmp_path / "twice")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_saving_is_all_or_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_head(a_head(trouble=object()), tmp_path / "head")
    with pytest.raises(ValueError):
        save_head(a_head(trouble=float("nan")), tmp_path / "head")
    assert not list(tmp_path.iterdir())
    save_head(a_head(), tmp_path / "head")
    with pytest.raises(ValueError, match="is there already"):
        save_head(a_head(), tmp_path / "head")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "other"}, "variant must be one of"),
        ({"inputs": ["draft_prob"]}, "inputs must be hidden, then some of"),
        ({"inputs": ["hidden", "token"]}, "inputs must be hidden, then some of"),
        ({"rejection_weight": 0}, "rejection_weight must be a number"),
        ({"lag": 2}, "lag must be a whole number in 0..1"),
        ({"schema_version": 9}, "schema_version must be"),
        ({"model_sha256": "0"}, "damaged"),
        ({"models": []}, "models must be an object"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, change, said):
    folder = save_head(a_head(), tmp_path / "head")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=said):
        load_head(folder)


def test_debiasing_is_the_inverse_of_the_weight():
    from mdp.head_rule import unweighted

    head = a_head("published", rejection_weight=6.0)
    x = torch.randn(50, WIDTH)
    raw = dataclasses.replace(head, debias=False).score(x).double().numpy()
    np.testing.assert_allclose(head.score(x).numpy(), unweighted(raw, 6.0), rtol=1e-4)


def test_safetensors_of_shared_blocks_hold_one(tmp_path):
    folder = save_head(a_head("published", layers=4), tmp_path / "head")
    module = a_head("published", layers=4).module
    apart = {key: value.clone() for key, value in module.state_dict().items()}
    assert (folder / "model.safetensors").stat().st_size < 0.5 * len(save(apart))

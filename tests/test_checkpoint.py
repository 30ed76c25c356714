"""Our own checkpoints: what comes back, what is kept, what is refused."""
import resource

import pytest
import safetensors.torch
import timm
import torch

from conftest import BANK, tiny
from machinery.files import read_tensors, save_tensors
from machinery.networks.checkpoint import FROZEN_PARAMETERS, load_model, save_model
from reference import denoiser_state, losses_of, training_batch


def outputs(model):
    """All that a model computes of a batch: list of tensors."""
    batch = model.features(training_batch())
    encoded = model.encode(batch)
    classes = model.embed_classes(["cow", ["sea", "ocean"]])
    return [batch["class_token"], batch["patch_tokens"], *encoded.values(), classes,
            *losses_of(model, training_batch()).values()]


def assert_same_outputs(one, other):
    """Two models compute the same, bit for bit."""
    pairs = zip(outputs(one.eval()), outputs(other.eval()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_loaded_model_is_the_saved_one(tmp_path, where):
    """A model loaded from its file or folder gives bit-identical outputs, with its settings, its
    protocol, its bank and those of its run."""
    model = tiny(backbone={"mean": (.4, .5, .6), "std": (.3, .3, .2), "image_token": "mean"},
                 text={"layers": 2}, local_weight=0.2, pool_temperature=0.3, local_temperature=0.5,
                 local_target="argmax", pool_query="caption")
    torch.nn.init.constant_(model.logit_scale, 1.5)
    model.protocol.scales = (1.0, 1.5)
    path = tmp_path / "new" / "model.safetensors"
    save_model(path, model, {"run": {"batch": 7}})
    loaded = load_model(path if where == "file" else path.parent)
    assert list(path.parent.iterdir()) == [path]
    assert_same_outputs(model, loaded)
    assert loaded.bank == BANK and loaded.trained_with == {"run": {"batch": 7}}
    assert loaded.settings == model.settings and loaded.protocol == model.protocol
    assert not loaded.training


def test_a_random_backbone_is_stored_and_restored(tmp_path):
    """A random backbone is written into the file, and restored bit for bit, again and again."""
    model = tiny(backbone={"name": "test_resnet", "weights": "random"})
    for name in ("one", "two"):
        path = tmp_path / f"{name}.safetensors"
        save_model(path, model, {})
        torch.manual_seed(99)
        loaded = load_model(path)
        assert loaded.settings.backbone.weights == "random"
        assert_same_outputs(model, loaded)
        model = loaded


def test_a_frozen_backbone_is_not_stored(tmp_path, monkeypatch):
    """Of a backbone with weights of its own only the file's name and a hash are stored; other
    weights are refused, the right ones found, from any folder."""
    weights = timm.create_model("test_resnet").state_dict()
    path = tmp_path / "weights.safetensors"
    moved = tmp_path / "moved.safetensors"
    safetensors.torch.save_file(weights, path)
    monkeypatch.chdir(tmp_path)
    model = tiny(backbone={"name": "test_resnet", "weights": path.name})
    save_model(tmp_path, model, {})
    monkeypatch.chdir("/")
    header, tensors = read_tensors(tmp_path / "model.safetensors")
    assert not any(name.startswith("backbone.") for name in tensors)
    assert header["settings"]["backbone"]["weights"] == str(path)
    assert_same_outputs(model, load_model(tmp_path))

    path.rename(moved)
    with pytest.raises(FileNotFoundError, match=f"no file {path}"):
        load_model(tmp_path)
    assert_same_outputs(model, load_model(tmp_path, backbone_weights=moved))
    weights["conv1.0.weight"] += 1e-6
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ValueError, match="not those that .*--backbone-weights FILE"):
        load_model(tmp_path)


def test_a_denoiser_is_in_the_checkpoint(tmp_path):
    """A denoiser is stored in the checkpoint, so that its file is not needed again; it changes the
    patch tokens."""
    path = tmp_path / "denoiser.safetensors"
    safetensors.torch.save_file(denoiser_state(128), path)
    model = tiny(backbone={"denoiser": str(path)})
    assert not any("denoiser" in name for name in model.trained())
    save_model(tmp_path, model, {})
    path.unlink()
    loaded = load_model(tmp_path)
    assert loaded.settings == model.settings
    assert_same_outputs(model, loaded)
    assert not torch.equal(outputs(tiny())[1], outputs(loaded)[1])


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    """A save for which the disk has no room ends with one error, and leaves the checkpoint that was
    there before and nothing else."""
    path = tmp_path / "model.safetensors"
    old = tiny(seed=1)
    save_model(path, old, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))       # bytes of a file
    try:
        with pytest.raises(OSError, match=f"{path} could not be written"):
            save_model(path, tiny(seed=2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert_same_outputs(old, load_model(path))


# --------------------------------------------------------------------------------------------------
# What is refused

def refusal(path, kind=ValueError, **arguments):
    """The one line with which a file is refused."""
    with pytest.raises(kind) as refused:
        load_model(path, **arguments)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("size", [0, 6, 5000, -1])
def test_a_checkpoint_cut_short_is_refused(checkpoint, tmp_path, size):
    """A checkpoint of which any part is missing is refused."""
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:size])
    assert f"{cut} is no SimZSS checkpoint, or is cut short" in refusal(cut)


@pytest.mark.parametrize("metadata", [None, "{", "[]", "3", "null", "[" * 100_000, "{}"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, metadata):
    """A text, and a tensors file without our header or with another, are refused."""
    path = tmp_path / "model.safetensors"
    path.write_text("no checkpoint at all")
    assert f"{path} is no SimZSS checkpoint" in refusal(path)
    metadata = {"simzss": metadata} if metadata else None
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
    assert f"{path} is no " in refusal(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    """A missing checkpoint is named, with the script that writes one."""
    path = tmp_path / "model.safetensors"
    assert f"no checkpoint at {path}; train.py writes one" in refusal(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("change, words", [
    ({"format": "simzss-2"}, "no checkpoint of format 'simzss-3', found 'simzss-2'; one of an "
                             "earlier version has to be trained again"),
    ({"method": "magic"}, "unknown method 'magic'; expected one of simzss"),
    ({"method": ["simzss"]}, "method is ['simzss']; expected a text"),
    ({"bank": "cow"}, "bank is 'cow'; expected a list"),
    ({"bank": [1]}, "bank is 1; expected a text"),
    ({"training": []}, "training is no table of settings"),
    ({"training": {"run": "x"}}, "training: run is 'x'; expected names with values"),
    ({"training": {"run": {"image_size": 10 ** 12}}}, "training: image_size is 1000000000000"),
    ({"training": {"step": float("nan")}}, "training: 'step' is nan; expected a finite number"),
    ({"settings": 3}, "settings: expected settings by name, found 3"),
    ({"settings": {"lambda": 1}}, "settings: there is no setting 'lambda'"),
    ({"settings": {"text": {"layers": -1}}}, "settings: text: layers is -1; expected at least 1"),
    ({"settings": {"text": {"layers": 10 ** 400}}}, "expected a smaller number"),
    ({"settings": {"backbone": {"name": "toy"}}}, "does not hold the tensors of its own settings"),
    ({"protocol": None}, "protocol: expected settings by name, found None"),
    ({"protocol": {"scales": [1e400]}}, "protocol: scales is inf; expected"),
    ({"protocol": {"stride": 999}}, "protocol: stride 999 is more than the window"),
    ({"seen_tokens": "xyz"}, "seen_tokens is 'xyz'; expected 49,408 bits"),
    ({"seen_tokens": 3}, "seen_tokens is 3; expected a text"),
    ({"frozen_sha256": None}, "not those that")])
def test_headers_with_nonsense_are_refused(checkpoint, tmp_path, change, words):
    """A header that is of another format, or holds anything but what was written, is refused with
    the entry that is wrong."""
    header, tensors = read_tensors(checkpoint)
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors, {**header, **change})
    assert words in refusal(path)


@pytest.mark.parametrize("backbone", [
    {"name": "hf-hub:someone/else"}, {"name": "local-dir:/tmp"},
    {"options": {"checkpoint_path": "other.pth"}},
    {"options": {"pretrained_cfg_overlay": {"file": "other.pth"}}}])
def test_a_header_opens_no_other_file(tmp_path, backbone):
    """A header that names a hub, a folder or an option that loads is refused."""
    path = tmp_path / "model.safetensors"
    save_model(path, tiny(backbone={"name": "test_vit", "weights": "random"}), {})
    header, tensors = read_tensors(path)
    header["settings"]["backbone"].update(backbone)
    save_tensors(path, tensors, header)
    message = refusal(path)
    assert "unknown backbone" in message or "option" in message


@pytest.mark.parametrize("table, change", [
    ("text", {"width": 10 ** 6}), ("text", {"width": 10 ** 9}), ("text", {"layers": 10 ** 9}),
    ("text", {"heads": 5}), ("backbone", {"name": "vit_giant_patch14_dinov2"}),
    ("backbone", {"options": {"depth": 10 ** 6}}), ("backbone", {"options": {"mlp_ratio": 1e5}}),
    ("backbone", {"options": {"embed_dim": 10 ** 9}}),
    ("backbone", {"options": {"num_heads": 0}})])
def test_sizes_that_cannot_be_are_refused(tmp_path, table, change):
    """A header that asks for a network larger than its file holds, or for one that cannot be, is
    refused before the network takes more memory than that of the parameters that are allowed, in
    float32, and a little."""
    path = tmp_path / "model.safetensors"
    save_model(path, tiny(backbone={"name": "test_vit", "weights": "random"}), {})
    header, tensors = read_tensors(path)
    header["settings"][table].update(change)
    save_tensors(path, tensors, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                     # kB
    assert len(refusal(path)) < 2000
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 4 * FROZEN_PARAMETERS / 1024 + 100_000


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("logit_scale"), "1 missing: logit_scale"),
    (lambda t: t.update(more=torch.zeros(1)), "1 unexpected: more"),
    (lambda t: t["logit_scale"].fill_(torch.nan), "1 not finite: logit_scale"),
    (lambda t: t.update(logit_scale=torch.tensor(1e300, dtype=torch.float64)),
     "1 not finite: logit_scale"),
    (lambda t: t.update(logit_scale=torch.zeros(2)), "1 misshapen: logit_scale [2] instead of []")])
def test_tensors_that_do_not_fit_are_refused(checkpoint, tmp_path, change, words):
    """A checkpoint without one of its tensors, with one more, with one of another shape, or with
    values that are not finite in float32 is refused by the name."""
    header, tensors = read_tensors(checkpoint)
    change(tensors)
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors, header)
    message = refusal(path)
    assert "does not hold the tensors of its own settings" in message and words in message


def test_a_checkpoint_names_its_backbone(checkpoint, tmp_path):
    """The backbone of a checkpoint of ours cannot be renamed, and one whose weights it holds itself
    takes no file of weights."""
    assert "backbone='test_vit'" in refusal(checkpoint, backbone="test_vit")
    assert "image_token='mean'" in refusal(checkpoint, image_token="mean")
    save_model(tmp_path, tiny(backbone={"name": "test_vit", "weights": "random"}), {})
    assert "leave --backbone-weights out" in refusal(tmp_path, backbone_weights="x.pth")


@pytest.mark.parametrize("flag", ["backbone", "backbone_weights", "image_token"])
def test_clip_takes_no_other_backbone(flag):
    """--checkpoint clip names its network itself, and how one names a file."""
    assert "clip:MODEL/FILE" in refusal("clip:ViT-B-16/random", **{flag: "mean"})

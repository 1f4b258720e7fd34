"""Importing checkpoints in the authors' layout, built here from its description."""

from __future__ import annotations

import argparse
import json
import os
import pickle

import pytest
import torch
from conftest import SHARED, lively
from safetensors.torch import save_file
from typer.testing import CliRunner

from vitkit import BadInput, BadRequest
from vitkit.cli.main import app
from vitkit.models import build
from vitkit.models.checkpoints import load_checkpoint
from vitkit.models.remax import RelaxedTraining
from vitkit.runs import load_run

NANO = "ps_vit_nano"
# Names and shapes of the decoders in the authors' layout, where the machine has them.
LISTED = SHARED.parent / "reference" / "checkpoint-kmax-decoders.txt"


def theirs(model) -> dict[str, torch.Tensor]:
    """The authors' names for a model's tensors, aliases and buffers included."""
    config, state, result = model.config, model.state_dict(), {}
    for key, tensor in state.items():
        key = key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        if key.startswith("sampler.pos_layer."):
            leaf = key.rsplit(".", 1)[1]
            result[f"pos_layer.{leaf}"] = tensor
            result.update({f"ps_layers.{t}.position_layer.{leaf}": tensor for t in range(config.iterations)})
        elif key.startswith("sampler.layers."):
            _, _, index, leaf = key.split(".", 3)
            for t in range(config.iterations) if config.share else [int(index)]:
                result[f"ps_layers.{t}.transformer_layer.{leaf}"] = tensor
        elif key.startswith("sampler.offset_layers."):
            _, _, index, leaf = key.split(".", 3)
            result[f"ps_layers.{index}.offset_layer.{leaf}"] = tensor
        else:
            result[key.replace("encoder.", "trans_layers.")] = tensor
    result["point_coord"] = torch.zeros(1, config.n**2, 2)
    return {name: tensor.clone() for name, tensor in result.items()}


@pytest.fixture(params=[False, True], ids=["plain", "share"])
def model(request):
    return lively(build(NANO, share=request.param))


def load(path, model, **options):
    options = {"share": model.config.share, **options}
    return load_checkpoint(path, "psvit", NANO, options).model


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_arrive_from_every_nesting(tmp_path, model, nest, prefix):
    state = {prefix + name: tensor for name, tensor in theirs(model).items()}
    body = state if nest is None else {nest: state, "epoch": 3, "args": argparse.Namespace(lr=1)}
    torch.save(body, tmp_path / "a.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a.pth", model)(images), model(images))


def test_formats_that_store_shared_tensors_once_and_halves(tmp_path, model):
    state = theirs(model)
    slim = {n: t for n, t in state.items() if ".position_layer." not in n and "num_batches" not in n}
    del slim["point_coord"]
    save_file(slim, tmp_path / "a.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a.safetensors", model)(images), model(images))
        torch.save(
            {n: t.half() if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "h.pth"
        )
        half = load(tmp_path / "h.pth", model)
        assert next(half.parameters()).dtype == torch.float32
        assert (half(images) - model(images)).abs().max() < 0.1


def test_the_softmax_scale_is_an_option(tmp_path, model):
    torch.save(theirs(model), tmp_path / "a.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(load(tmp_path / "a.pth", model, qk_scale="dim")(images), model(images))


def test_every_wrong_tensor_is_named(tmp_path):
    model = lively(build(NANO, share=True))
    state = theirs(model)
    del state["norm.bias"]
    state["head.weight"] = state["head.weight"][:3]
    state["extra.weight"] = torch.zeros(2)
    state["ps_layers.2.transformer_layer.norm1.weight"] += 1
    state["ps_layers.1.position_layer.bias"] += 1
    state["trans_layers.0.norm1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(BadInput) as error:
        load(tmp_path / "a.pth", model)
    for words in (
        "norm.bias is missing",
        "head.weight is [3, ",
        "extra.weight is extra",
        "ps_layers.2.transformer_layer.norm1.weight differs from ps_layers.0.transformer_layer.norm1.weight",
        "ps_layers.1.position_layer.bias differs from pos_layer.bias",
        "trans_layers.0.norm1.bias holds NaN",
    ):
        assert words in str(error.value)


def test_only_plain_floats_are_weights(tmp_path, model):
    state = theirs(model)
    for name, value in {
        "int": state["head.weight"].to(torch.int8),
        "complex": state["head.weight"].to(torch.complex64),
        "huge": torch.full_like(state["head.weight"], 1e300, dtype=torch.float64),
        "sparse": state["head.weight"].to_sparse(),
    }.items():
        torch.save({**state, "head.weight": value}, tmp_path / f"{name}.pth")
        with pytest.raises(BadInput, match=r"head\.weight (is|holds)"):
            load(tmp_path / f"{name}.pth", model)
    torch.save({**state, "stem.1.running_var": -state["stem.1.running_var"]}, tmp_path / "negative.pth")
    with pytest.raises(BadInput, match="variance"):
        load(tmp_path / "negative.pth", model)
    endless: dict = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    with pytest.raises(BadInput, match="dictionary of tensors"):
        load(tmp_path / "endless.pth", model)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_no_code_runs_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    model = build(NANO)
    state = theirs(model)
    torch.save({"model": state, "note": Evil()}, tmp_path / "evil1.pth")
    torch.save({"model": state, "note": Evil()}, tmp_path / "evil2.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "evil3.pth").write_bytes(pickle.dumps(Evil()))
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {}}, tmp_path / "hollow.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    (tmp_path / "json.pth").write_text(json.dumps({"a": 1}))
    for path in sorted(tmp_path.iterdir()):
        if path.name != "whole.pth":
            with pytest.raises(BadInput, match=path.name):
                load(path, model)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(BadInput, match=r"nowhere\.pth"):
        load(tmp_path / "nowhere.pth", model)
    with pytest.raises(BadRequest, match="kmaxx"):
        load_checkpoint(tmp_path / "whole.pth", "kmaxx", NANO, {})


def test_a_classifier_gets_a_fresh_head(tmp_path):
    model = lively(build(NANO, num_classes=7))
    torch.save(theirs(model), tmp_path / "a.pth")
    with pytest.raises(BadInput, match=r"7 classes.* 10 .*num_classes=7.*--reset-head"):
        load_checkpoint(tmp_path / "a.pth", "psvit", NANO, {})
    fresh = load_checkpoint(tmp_path / "a.pth", "psvit", NANO, {}, reset_head=True)
    assert fresh.reset == ("head",)
    again = load_checkpoint(tmp_path / "a.pth", "psvit", NANO, {}, reset_head=True)
    for key, tensor in fresh.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[key])
        assert key.startswith("head.") or torch.equal(tensor, model.state_dict()[key])


class KMaXNames:
    """A model's tensors in the layout of kMaX-DeepLab's PyTorch port, written down module by module."""

    def __init__(self, model, training=None):
        self.found: dict[str, torch.Tensor] = {}
        self.backbone(model)
        self.pixel_decoder(model.pixel_decoder, "sem_seg_head.pixel_decoder")
        self.decoder(model.decoder, "sem_seg_head.predictor")
        if training is not None:
            self.semantic(training.semantic, "sem_seg_head.predictor._auxiliary_semantic_predictor")

    def add(self, name, tensor):
        assert name not in self.found
        self.found[name] = tensor.detach()

    def norm(self, module, name):
        for leaf, tensor in module.state_dict().items():
            self.add(f"{name}.{leaf}", tensor)

    def conv(self, module, name):
        """A convolution and its norm; a linear layer and its norm, as a 1-d convolution."""
        product = module.conv if hasattr(module, "conv") else module.linear
        shape = product.weight.shape if product.weight.ndim == 4 else (*product.weight.shape, 1)
        self.add(f"{name}.conv.weight", product.weight.reshape(shape))
        if product.bias is not None:
            self.add(f"{name}.conv.bias", product.bias)
        self.norm(module.norm, f"{name}.norm")

    def backbone(self, model):
        if not model.config.backbone.startswith("resnet"):
            self.found |= {f"backbone.{name}": t for name, t in model.backbone.state_dict().items()}
            return
        network = model.backbone
        self.add("backbone.stem.conv1.weight", network.conv1.weight)
        self.norm(network.bn1, "backbone.stem.conv1.norm")
        for i, stage in enumerate((network.layer1, network.layer2, network.layer3, network.layer4)):
            for j, block in enumerate(stage):
                for k in "123":
                    name = f"backbone.res{i + 2}.{j}.conv{k}"
                    self.add(f"{name}.weight", getattr(block, f"conv{k}").weight)
                    self.norm(getattr(block, f"bn{k}"), f"{name}.norm")
                if block.downsample is not None:
                    self.add(f"backbone.res{i + 2}.{j}.shortcut.weight", block.downsample[0].weight)
                    self.norm(block.downsample[1], f"backbone.res{i + 2}.{j}.shortcut.norm")

    def pixel_decoder(self, module, name):
        for i, norm in enumerate(module.norms):
            self.norm(norm, f"{name}._in_norms.{i}")
        for i, stage in enumerate(module.stages):
            for j, block in enumerate(stage):
                self.block(block, f"{name}._stages.{i}._blocks.{j}", axial=i < 2)
        for i, fuse in enumerate(module.fuses):
            self.conv(fuse.low, f"{name}._resized_fuses.{i}._conv_bn_low")
            if fuse.high is not None:
                self.conv(fuse.high, f"{name}._resized_fuses.{i}._conv_bn_high")

    def block(self, block, name, axial):
        self.conv(block.conv1, f"{name}._conv1_bn_act")
        if axial:
            self.attention(block.height, f"{name}._attention._height_axis")
            self.attention(block.width, f"{name}._attention._width_axis")
        else:
            self.conv(block.conv2, f"{name}._conv2_bn_act")
        self.conv(block.conv3, f"{name}._conv3_bn")
        if list(block.shortcut.parameters()):
            self.conv(block.shortcut, f"{name}._shortcut")

    def attention(self, module, name):
        self.add(f"{name}.qkv_transform.conv.weight", module.qkv.weight[:, :, :, 0])
        self.norm(module.qkv_norm, f"{name}._batch_norm_qkv")
        self.norm(module.similarity_norm, f"{name}._batch_norm_similarity")
        self.norm(module.output_norm, f"{name}._batch_norm_retrieved_output")
        self.add(f"{name}._query_rpe._embeddings.weight", module.query_table)
        self.add(f"{name}._key_rpe._embeddings.weight", module.key_table)
        self.add(f"{name}._value_rpe._embeddings.weight", module.value_table)

    def decoder(self, module, name):
        self.add(f"{name}._cluster_centers.weight", module.centres.T.contiguous())
        self.conv(module.class_embedding, f"{name}._class_embedding_projection")
        self.conv(module.mask_embedding, f"{name}._mask_embedding_projection")
        self.predictor(module.predictor, f"{name}._predcitor")
        for i, block in enumerate(module.blocks):
            place = f"{name}._kmax_transformer_layers.{i}"
            self.conv(block.query_in, f"{place}._query_conv1_bn_act")
            self.conv(block.pixel_in, f"{place}._pixel_conv1_bn_act")
            self.conv(block.attention.qkv, f"{place}._query_qkv_conv_bn")
            self.conv(block.value, f"{place}._pixel_v_conv_bn")
            inner = f"{place}._query_self_attention"
            self.norm(block.attention.similarity_norm, f"{inner}._batch_norm_similarity")
            self.norm(block.attention.value_norm, f"{inner}._batch_norm_retrieved_value")
            self.conv(block.attention.out, f"{place}._query_conv3_bn")
            self.conv(block.ffn_in, f"{place}._query_ffn_conv1_bn_act")
            self.conv(block.ffn_out, f"{place}._query_ffn_conv2_bn")
            self.predictor(block.predictor, f"{place}._predcitor")
            self.norm(block.update_norm, f"{place}._kmeans_query_batch_norm_retrieved_value")
            self.conv(block.update, f"{place}._kmeans_query_conv3_bn")

    def predictor(self, module, name):
        self.conv(module.pixel_depthwise, f"{name}._pixel_space_head_conv0bnact")
        self.conv(module.pixel_mix, f"{name}._pixel_space_head_conv1bnact")
        self.conv(module.pixel_out, f"{name}._pixel_space_head_last_convbn")
        self.conv(module.mask_kernel, f"{name}._transformer_mask_head")
        self.add(f"{name}._transformer_class_head.conv.weight", module.class_head.weight[:, :, None])
        self.add(f"{name}._transformer_class_head.conv.bias", module.class_head.bias)
        self.norm(module.mask_norm, f"{name}._pixel_space_mask_batch_norm")

    def semantic(self, module, name):
        for i, conv in enumerate([module.aspp.point, *module.aspp.around]):
            self.conv(conv, f"{name}._aspp._aspp_conv{i}")
        self.conv(module.aspp.whole, f"{name}._aspp._aspp_pool")
        self.conv(module.aspp.project, f"{name}._aspp._proj_conv_bn_act")
        for stride, project, fuse in ((8, module.project8, module.fuse8), (4, module.project4, module.fuse4)):
            self.conv(project, f"{name}._low_level_projection_os{stride}")
            self.conv(fuse[0], f"{name}._low_level_fusion_os{stride}_conv0_bn_act")
            self.conv(fuse[1], f"{name}._low_level_fusion_os{stride}_conv1_bn_act")
        self.conv(module.head[0], f"{name}.conv_block_0")
        self.conv(module.head[1], f"{name}.conv_block_1")
        self.add(f"{name}.final_conv.conv.weight", module.out.weight)
        self.add(f"{name}.final_conv.conv.bias", module.out.bias)


def scattered(model):
    """Fill every tensor of a model with numbers of its own, so that none can be taken for another."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5 * (not name.endswith("_var")))
        else:
            tensor.fill_(int(torch.randint(1000, (), generator=generator)))
    return model.eval()


RESNET = {
    "backbone": "resnet50", "pixel_widths": (16, 16, 512, 8), "pixel_blocks": (1, 2, 1, 2),
    "decoder_blocks": (2, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"), [("kmax_nano", {**RESNET, "num_classes": 19}), ("remax_nano", {})]
)
def test_every_tensor_of_kmax_arrives(tmp_path, name, options):
    model = scattered(build(name, **options))
    state = KMaXNames(model, scattered(RelaxedTraining(model))).found
    state["criterion.empty_weight"] = torch.ones(3)
    torch.save({"model": {f"module.{n}": t for n, t in state.items()}, "iteration": 7}, tmp_path / "a.pth")
    imported = load_checkpoint(tmp_path / "a.pth", "kmax", name, options)
    assert imported.model.config == model.config
    assert imported.reset == ()
    assert not imported.model.training
    assert all("_auxiliary_semantic_predictor" in name or "criterion" in name for name in imported.ignored)
    assert len(imported.ignored) == 1 + sum("_auxiliary_" in name for name in state)
    ours = imported.model.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[key]), key


@pytest.mark.skipif(not LISTED.is_file(), reason=f"the list of the layout's tensors is not at {LISTED}")
def test_the_decoders_have_the_names_and_shapes_of_the_layout():
    with torch.device("meta"):
        model = build("remax_t")
        found = KMaXNames(model, RelaxedTraining(model)).found
    ours = {n: "x".join(map(str, t.shape)) or "scalar" for n, t in found.items() if n.startswith("sem_seg_")}
    listed = dict(line.split() for line in LISTED.read_text().splitlines())
    assert sorted(listed.keys() - ours.keys()) == []
    assert sorted(ours.keys() - listed.keys()) == []
    assert {name: shape for name, shape in ours.items() if listed[name] != shape} == {}


@pytest.fixture(scope="module")
def kmax():
    model = scattered(build("kmax_nano", num_classes=5))
    return model, {name: tensor.clone() for name, tensor in KMaXNames(model).found.items()}


def test_every_wrong_tensor_of_kmax_is_named(tmp_path, kmax):
    state, decoder = {name: tensor.clone() for name, tensor in kmax[1].items()}, "sem_seg_head.predictor"
    del state["backbone.conv_stem.weight"]
    del state[f"{decoder}._predcitor._transformer_mask_head.norm.bias"]
    del state[f"{decoder}._class_embedding_projection.norm.num_batches_tracked"]
    state[f"{decoder}._predictor.weight"] = torch.zeros(2)
    state[f"{decoder}._cluster_centers.weight"] = state[f"{decoder}._cluster_centers.weight"].T
    qkv = "sem_seg_head.pixel_decoder._stages.0._blocks.0._attention._width_axis.qkv_transform.conv.weight"
    state[qkv] = state[qkv][..., None]
    state["sem_seg_head.pixel_decoder._in_norms.0.bias"][3] = float("inf")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(BadInput) as error:
        load_checkpoint(tmp_path / "a.pth", "kmax", "kmax_nano", {"num_classes": 5})
    problems = str(error.value).split(": ", 1)[1].split("; ")
    assert len(problems) == 6
    for words in (
        "backbone.conv_stem.weight is missing",
        f"{decoder}._predcitor._transformer_mask_head.norm.bias is missing",
        f"{decoder}._predictor.weight is extra",
        f"{decoder}._cluster_centers.weight is [24, 64], not [64, 24]",
        f"{qkv} is [256, 128, 1, 1], not [256, 128, 1]",
        "sem_seg_head.pixel_decoder._in_norms.0.bias holds NaN or infinite values",
    ):
        assert words in problems


def test_another_number_of_classes_is_an_error_or_a_fresh_head(tmp_path, kmax):
    model, state = kmax
    path = tmp_path / "a.pth"
    torch.save(state, path)
    with pytest.raises(BadInput) as error:
        load_checkpoint(path, "kmax", "kmax_nano", {})
    for words in ("for 5 classes", "model's for 9", "--option num_classes=5", "--reset-head"):
        assert words in str(error.value)
    assert "class_head" not in str(error.value)
    torch.save({**state, "more.bias": torch.zeros(1)}, path)
    with pytest.raises(BadInput, match=r"5 classes.*more\.bias is extra"):
        load_checkpoint(path, "kmax", "kmax_nano", {})

    # With the flag heads are fresh, whatever the file has in their place.
    for count in (5, 9):
        torch.save({n: t for n, t in state.items() if "class_head.conv.bias" not in n}, path)
        fresh = load_checkpoint(path, "kmax", "kmax_nano", {"num_classes": count}, reset_head=True)
        assert fresh.reset == tuple(
            f"{place}.class_head"
            for place in (*(f"decoder.blocks.{i}.predictor" for i in range(3)), "decoder.predictor")
        )
        for key, tensor in fresh.model.state_dict().items():
            if "class_head" not in key:
                assert torch.equal(tensor, model.state_dict()[key]), key
            elif key.endswith("bias"):
                assert tensor.shape == (count + 1,)
                assert not tensor.any()
            else:
                assert 0.005 < tensor.std() < 0.02

    # Heads that contradict each other are named one by one.
    odd = "sem_seg_head.predictor._predcitor._transformer_class_head.conv.bias"
    torch.save({**state, odd: torch.zeros(4)}, path)
    with pytest.raises(BadInput, match=rf"{odd} is \[4\], not \[6\]"):
        load_checkpoint(path, "kmax", "kmax_nano", {"num_classes": 5})
    torch.save({**state, odd: torch.zeros(())}, path)
    with pytest.raises(BadInput, match=rf"{odd} is \[\], not \[6\]"):
        load_checkpoint(path, "kmax", "kmax_nano", {"num_classes": 5})


def test_formats_and_models_must_fit(tmp_path, kmax):
    torch.save(kmax[1], tmp_path / "a.pth")
    with pytest.raises(BadRequest, match=r"'psvit' holds no kmax_nano.*--format kmax"):
        load_checkpoint(tmp_path / "a.pth", "psvit", "kmax_nano", {})
    with pytest.raises(BadRequest, match=r"'kmax' holds no ps_vit_nano.*--format psvit"):
        load_checkpoint(tmp_path / "a.pth", "kmax", NANO, {})


def run(tmp_path, *arguments):
    return CliRunner().invoke(app, ["import", *map(str, arguments), "-o", str(tmp_path / "run")])


def test_the_command_makes_a_run_with_its_classes(tmp_path, kmax):
    model, state = kmax
    heads = KMaXNames(model, RelaxedTraining(model)).found
    torch.save({"model": {**heads, **state, "criterion.empty_weight": torch.ones(6)}}, tmp_path / "a.pth")
    listed = [
        {"id": number, "name": f"kind {number}", "isthing": number % 2, "color": [1, 2, 3]}
        for number in (8, 3, 5, 12, 7)
    ]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "categories": listed}))
    basis = [tmp_path / "a.pth", "--format", "kmax", "--model", "kmax_nano"]
    five = [*basis, "--option", "num_classes=5"]

    for file in ("list.json", "coco.json"):
        done = run(tmp_path, *five, "--categories", tmp_path / file)
        assert done.exit_code == 0, done.stderr
        assert f"left out: {1 + len(heads) - len(state)} tensors" in done.stderr
        made = load_run(tmp_path / "run")
        assert made.card.labels == ("kind 3", "kind 5", "kind 7", "kind 8", "kind 12")
        assert made.card.label_ids == ("3", "5", "7", "8", "12")
        assert made.card.decode["things"] == [0, 1, 2]
    images = torch.randn(1, 3, 129, 129)
    with torch.no_grad():
        for ours, expected in zip(made.model.deploy(images), model.deploy(images), strict=True):
            assert torch.equal(ours, expected)

    done = run(tmp_path, *five)
    assert "--categories" in done.stderr
    assert load_run(tmp_path / "run").card.labels == ("0", "1", "2", "3", "4")

    done = run(tmp_path, *basis, "--option", "num_classes=133", "--reset-head")
    line = next(line for line in done.stderr.splitlines() if "fresh" in line)
    assert "133 classes" in line
    assert line.count(".class_head") == 4
    card = load_run(tmp_path / "run").card
    assert card.labels[0] == "person"
    assert card.provenance["weights"]["reset"].endswith("decoder.predictor.class_head")

    for extra, words in [
        (["--categories", tmp_path / "list.json"], "5 categories, the model has 9.*num_classes=5"),
        ([], "5 classes.* 9"),
    ]:
        done = run(tmp_path, *basis, *extra)
        with pytest.raises(BadInput, match=words):
            raise done.exception


def test_the_command_names_a_classifier_by_imagenet(tmp_path):
    model = lively(build(NANO, num_classes=1000))
    torch.save(theirs(model), tmp_path / "a.pth")
    basis = [tmp_path / "a.pth", "--format", "psvit", "--model", NANO, "--option", "num_classes=1000"]
    assert run(tmp_path, *basis).exit_code == 0
    card = load_run(tmp_path / "run").card
    assert card.labels[0].startswith("tench")
    assert card.label_ids[0] == "n01440764"
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(BadRequest, match="classifier"):
        raise run(tmp_path, *basis, "--categories", tmp_path / "list.json").exception


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("[]", "no list"),
        ('{"images": []}', "no list"),
        ("3", "no list"),
        ('[{"id": 1, "name": "a", "isthing": 1}, {"id": 1, "name": "b", "isthing": 1}]', "1 occurs twice"),
        ('[{"id": 1, "name": "a"}]', "category 0 must"),
        ('[{"id": "1", "name": "a", "isthing": 1}]', "category 0 must"),
        ('[{"id": 1, "name": "", "isthing": 1}]', "category 0 must"),
        ('[{"id": 1, "name": "a", "isthing": 2}]', "category 0 must"),
        ('[{"id": 1, "name": "a", "isthing": 1}, 7]', "category 1 must"),
    ],
)
def test_bad_categories_are_refused_before_any_work(tmp_path, text, words):
    (tmp_path / "list.json").write_text(text)
    basis = [tmp_path / "nowhere.pth", "--format", "kmax", "--model", "kmax_nano"]
    done = run(tmp_path, *basis, "--categories", tmp_path / "list.json")
    with pytest.raises(BadInput, match=words):
        raise done.exception

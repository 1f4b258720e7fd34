"""Networks with a planted fault: each is refused with its cause and its cure; sound ones pass."""

from __future__ import annotations

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitkit.exporters.foreign import ForeignModule, check_network, flatten
from vitkit.runtimes.card import TensorSpec
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.image import ImageSpec, generated_photos, prepare_batch

IMAGE = ImageSpec((32, 48), layout="NCHW", dtype="float32")
INPUTS = torch.from_numpy(prepare_batch(generated_photos(2), IMAGE))


class Net(nn.Module):
    """A small classifier; faulty ones change `forward`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()))

    def features(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.head(self.drop(self.features(x)))


def faulty(forward, prepare=lambda net: None):
    """A network whose forward is `forward(net, x)`."""
    net = type("Faulty", (Net,), {"forward": forward})().eval()
    prepare(net)
    return net


def problem(net, inputs=INPUTS, names=None, batch=None) -> str:
    with pytest.raises(BadRequest) as caught:
        check_network(net, inputs, names, batch)
    return str(caught.value)


def test_a_sound_network_passes_and_is_left_as_it_was():
    net = Net().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    wanted = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    assert check_network(net, INPUTS) == (TensorSpec("logits", (None, 5), "float32"),)
    assert (torch.rand(1), random.random(), np.random.rand()) == wanted
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net.bn._forward_hooks


class Attention(nn.Module):
    """Tagged by torch as random though it drops nothing out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.norm = nn.InstanceNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        tokens = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (2, 8)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return self.attention(mixed, mixed, mixed, need_weights=False)[0].mean(1)


def test_attention_and_instance_norms_are_neither_random_nor_of_the_batch():
    check_network(Attention().eval(), INPUTS)


# Training mode


def test_training_mode_of_the_whole_network():
    text = problem(Net().train())
    assert "training mode" in text
    assert "network.eval()" in text


@pytest.mark.parametrize("part", ["bn", "drop"])
def test_one_module_left_in_training_mode(part):
    net = Net().eval()
    getattr(net, part).train()
    assert problem(net).startswith(f"{part} ({type(getattr(net, part)).__name__}) is in training mode")


def test_a_train_method_that_keeps_training_mode():
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    net = Net()
    net.bn = Stubborn(8)
    assert "bn (Stubborn) is in training mode" in problem(net.eval())


def test_dropout_as_a_function_that_ignores_the_mode():
    text = problem(faulty(lambda net, x: net.head(F.dropout(net.features(x), 0.5))))
    assert "depend on chance" in text
    assert "bernoulli" in text
    assert "training=self.training" in text


def test_attention_that_drops_out_in_eval_mode():
    def forward(net, x):
        tokens = net.conv(x).flatten(2).transpose(1, 2)
        return net.head(F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.2).mean(1))

    assert "depend on chance" in problem(faulty(forward))


def test_batch_norm_as_a_function_that_takes_the_statistics_of_the_batch():
    def forward(net, x):
        x = F.batch_norm(net.conv(x), None, None, training=True)
        return net.head(x.relu().mean((2, 3)))

    text = problem(faulty(forward))
    assert "depend on the other images of the batch" in text
    assert "running statistics" in text


def test_a_batch_norm_without_running_statistics():
    def prepare(net):
        net.bn = nn.BatchNorm2d(8, track_running_stats=False).eval()

    text = problem(faulty(Net.forward, prepare))
    assert "other images of the batch" in text
    assert "bn (BatchNorm2d)" in text


# Chance and state


@pytest.mark.parametrize(
    "draw",
    [
        lambda: float(torch.rand(())),
        lambda: random.random(),
        lambda: float(np.random.rand()),
        lambda: float(torch.randint(10, ())),
    ],
    ids=["torch", "python", "numpy", "integers"],
)
def test_random_operators(draw):
    text = problem(faulty(lambda net, x: Net.forward(net, x) + draw()))
    assert "depend on chance" in text
    assert "take it out of forward" in text


def test_random_operators_whose_effect_is_too_small_to_see():
    text = problem(faulty(lambda net, x: Net.forward(net, x) + 1e-12 * torch.randn(())))
    assert "randn in the network (Faulty) is random" in text


def add_to_buffer(net, x):
    net.calls += 1
    return Net.forward(net, x)


def add_to_attribute(net, x):
    net.count = getattr(net, "count", 0) + 1
    return Net.forward(net, x) * net.count


def keep_the_last_image(net, x):
    last, net.last = getattr(net, "last", x[:1]), x[-1:]
    return Net.forward(net, x) + Net.forward(net, last)


@pytest.mark.parametrize("forward", [add_to_buffer, add_to_attribute, keep_the_last_image])
def test_state_between_calls(forward):
    text = problem(faulty(forward))
    assert "keeps state between its calls" in text
    if forward is add_to_buffer:
        assert "calls is changed" in text


def test_an_input_changed_in_place():
    assert "changes its input in place" in problem(faulty(lambda net, x: Net.forward(net, x.sub_(0.5))))


def test_a_cache_that_changes_no_output_is_no_state():
    def forward(net, x):
        net.grid = torch.linspace(0, 1, x.shape[-1])
        return Net.forward(net, x * net.grid)

    check_network(faulty(forward), INPUTS)


# The batch


def test_an_output_that_depends_on_the_batch():
    text = problem(faulty(lambda net, x: Net.forward(net, x - x.mean(0, keepdim=True) * (len(x) > 1))))
    assert "depend on the other images of the batch" in text


def test_code_for_one_image_only():
    text = problem(faulty(lambda net, x: net.head(net.features(x).reshape(1, 8))))
    assert "takes one image, but not 2" in text
    assert "x.flatten(1)" in text
    # An exported program may be for one image; it is then run image by image.
    assert check_network(faulty(lambda net, x: net.head(net.features(x).reshape(1, 8))), INPUTS, batch=1)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: Net.forward(net, x).mean(),
        lambda net, x: Net.forward(net, x).flatten(),
        lambda net, x: {"logits": Net.forward(net, x), "anchors": torch.zeros(7, 4)},
    ],
)
def test_an_output_without_a_batch_dimension(forward):
    assert "its first dimension must be the batch" in problem(faulty(forward))


def test_an_output_whose_shape_depends_on_the_content():
    def forward(net, x):
        found = (x[0, 0] > x[0, 1]).nonzero()
        return net.head(net.features(x)), found.unsqueeze(0)

    text = problem(faulty(forward))
    assert "output_1 has the shape" in text
    assert "return a fixed number" in text


# Numbers


def test_float64_weights_buffers_and_attributes():
    assert "conv.weight is float64" in problem(Net().double().eval())
    text = problem(faulty(Net.forward, lambda net: net.head.register_buffer("scale", torch.ones(1).double())))
    assert "head.scale is float64" in text
    assert "network.float()" in text
    assert "grid is float64" in problem(
        faulty(Net.forward, lambda net: setattr(net, "grid", torch.ones(1, dtype=torch.float64)))
    )


def test_half_precision_weights():
    assert "conv.weight is float16" in problem(Net().half().eval())


def test_a_float64_output():
    assert "the output logits is float64" in problem(
        faulty(lambda net, x: {"logits": Net.forward(net, x).double()})
    )


def test_weights_without_values_on_the_device_meta():
    net = Net().eval()
    net.head.to("meta")
    assert "head.weight is on the device meta" in problem(net)


def test_a_tensor_left_on_another_device_as_a_plain_attribute():
    def prepare(net):
        net.head.shift = torch.zeros(5, device="meta")

    text = problem(faulty(lambda net, x: Net.forward(net, x) + net.head.shift, prepare))
    assert "head.shift is on the device meta" in text


def test_a_tensor_made_on_another_device_in_forward():
    text = problem(faulty(lambda net, x: x.to("meta").mean((2, 3))))
    assert "is on the device meta" in text


@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (lambda x: (x * 255).to(torch.uint8), "uint8"),
        (lambda x: torch.full((len(x),), 200, dtype=torch.uint8) + 100, "uint8"),
        (lambda x: torch.full((len(x),), 200, dtype=torch.uint8).add_(100), "uint8"),
        (lambda x: (x > 0).int().flatten(1).sum(1, dtype=torch.int32).mul(2**22), "int32"),
        (lambda x: torch.arange(len(x) + 2).cumsum(0).pow(31)[-len(x) :], "int64"),
    ],
    ids=["conversion", "sum", "in place", "product", "beyond 32 bits"],
)
def test_integer_overflow(count, kind):
    def forward(net, x):
        return Net.forward(net, x) + 1e-9 * count(x).float().reshape(len(x), -1).mean(1, keepdim=True)

    text = problem(faulty(forward))
    assert "integers overflow" in text
    assert f"in {kind})" in text


def test_integers_in_range_pass():
    def forward(net, x):
        places = (x > 0).long().flatten(1).sum(1) * 3 - 1
        return Net.forward(net, x) + places.float().unsqueeze(1) * 1e-6

    check_network(faulty(forward), INPUTS)


def test_outputs_that_are_not_finite():
    assert "NaN or infinite" in problem(faulty(lambda net, x: Net.forward(net, x) / 0))


# Layout, size, names


def test_channels_last():
    text = problem(faulty(lambda net, x: Net.forward(net, x.permute(0, 3, 1, 2))))
    assert "channels last" in text
    assert "x.permute(0, 2, 3, 1)" in text


def test_another_size_than_the_network_takes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)).eval()
    text = problem(net)
    assert "(N, 3, 32, 48), in 2 (Linear)" in text
    assert "--size HEIGHT,WIDTH" in text


def test_softmax_in_the_network_is_seen_and_named():
    net = faulty(lambda net, x: Net.forward(net, x).softmax(1))
    assert check_network(net, INPUTS)[0].name == "probabilities"
    assert "holds probabilities" in problem(net, names=["logits"])
    assert "softmax is missing" in problem(Net().eval(), names=["probabilities"])


@pytest.mark.parametrize(
    ("network", "cure"),
    [
        (lambda: print, "torch.nn.Module"),
        (lambda: torch.jit.script(nn.Sequential(nn.Flatten()).eval()), "give the module"),
        (lambda: nn.DataParallel(Net()).eval(), ".module"),
        (lambda: torch.compile(Net().eval()), "._orig_mod"),
    ],
    ids=["function", "script", "parallel", "compiled"],
)
def test_what_is_no_plain_module(network, cure):
    assert cure in problem(network())


Pair = namedtuple("Pair", "scores boxes")


def test_outputs_are_named_by_keys_fields_and_places():
    a, b = torch.zeros(2, 1), torch.zeros(2, 3)
    assert list(flatten(a)) == ["output"]
    assert list(flatten((a, b))) == ["output_0", "output_1"]
    assert list(flatten(Pair(a, (b, a)))) == ["scores", "boxes.0", "boxes.1"]
    assert list(flatten({"logits": a, "hidden": None, "aux": {"x": b}})) == ["logits", "aux.x"]
    with pytest.raises(BadRequest, match="returns a float as loss"):
        flatten({"loss": 1.0})


def test_names_choose_among_keys_or_rename_places():
    by_key = faulty(lambda net, x: {"logits": Net.forward(net, x), "features": net.features(x)})
    (spec,) = check_network(by_key, INPUTS, ["features"])
    assert spec == TensorSpec("features", (None, 8), "float32")
    module = ForeignModule(by_key, ["features"])
    torch.testing.assert_close(module.deploy(INPUTS)[0], by_key.features(INPUTS))
    by_place = faulty(lambda net, x: (Net.forward(net, x), net.features(x)))
    assert [s.name for s in check_network(by_place, INPUTS, ["a", "b"])] == ["a", "b"]
    torch.testing.assert_close(
        ForeignModule(by_place, ["a", "b"]).deploy(INPUTS)[1], by_place.features(INPUTS)
    )
    assert "choose among them" in problem(by_key, names=["boxes"])
    assert "name each of them" in problem(by_place, names=["a"])


def test_a_network_for_one_image_runs_image_by_image():
    net = faulty(lambda net, x: net.head(net.features(x).reshape(1, 8)))
    (found,) = ForeignModule(net, ["logits"], batch=1).deploy(INPUTS)
    torch.testing.assert_close(found, Net.forward(net, INPUTS))

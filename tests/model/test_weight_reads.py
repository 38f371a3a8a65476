"""Statistics of a layer's calls are refused where the model also uses the layer's weight by itself."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp

WHERE = bp.linears((4, 4))
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
Use = Callable[[Any, Tensor], Any]


def written(memory: Tensor, weight: Tensor) -> Tensor:
    memory[:] = weight
    return memory


def fails(layer: Any, x: Tensor) -> bool:
    with pytest.raises(RuntimeError):
        layer(x)
    return True


def assigned(layer: Any) -> Any:
    layer.weight.data = torch.renorm(layer.weight.data, p=2, dim=0, maxnorm=1)
    return layer


def penalty(weight: Tensor) -> Tensor:
    return (weight @ weight.T - torch.eye(16)).square().sum() + weight.norm() + weight.abs().sum(0).square().sum()


USES: dict[str, Use] = {
    "transposed": lambda layer, x: F.linear(layer(x), layer.weight.T),
    "product": lambda layer, x: layer(x) @ layer.weight,
    "before": lambda layer, x: layer(x @ layer.weight),
    "keyword": lambda layer, x: F.linear(layer(x), weight=layer.weight),
    "data": lambda layer, x: layer(x) @ layer.weight.data,
    "detached": lambda layer, x: layer(x) @ layer.weight.detach(),
    "converted": lambda layer, x: layer(x) @ layer.weight.to(x.dtype),
    "in a list": lambda layer, x: layer(x) @ torch.cat([layer.weight, layer.weight]).T,
    "a part": lambda layer, x: layer(x) @ layer.weight.chunk(2)[0].T,
    "scaled": lambda layer, x: layer(x) * (2 * layer.weight.clone())[0].exp(),
    "added": lambda layer, x: layer(x) + layer.weight.mean(0),
    "written elsewhere": lambda layer, x: layer(x) @ written(x.new_empty(16, 16), layer.weight),
    "copied elsewhere": lambda layer, x: layer(x) @ x.new_empty(16, 16).copy_(layer.weight),
    "of a new parameter": lambda layer, x: layer(x) @ nn.Parameter(layer.weight),
    "rows of tokens": lambda layer, x: layer(F.embedding(x.argmax(1), layer.weight)),
    "after an error": lambda layer, x: layer(x) @ layer.weight if fails(layer, x[:, :3]) else None,
}
LOOKS: dict[str, Use] = {
    "dtype": lambda layer, x: layer(x.to(layer.weight.dtype)),
    "dtype of data": lambda layer, x: layer(x.to(layer.weight.data.dtype)),
    "device": lambda layer, x: layer(x.to(layer.weight.device)),
    "shape": lambda layer, x: layer(x) * layer.weight.shape[0] + layer.weight.size(0),
    "type of another": lambda layer, x: layer(x.to(layer.weight)).type_as(layer.weight),
    "a new tensor": lambda layer, x: layer(x) + torch.zeros_like(layer.weight)[0] + layer.weight.new_zeros(16),
    "kind": lambda layer, x: layer(x if layer.weight.is_floating_point() and isinstance(layer.weight, Tensor) else 0 * x),
    "module": lambda layer, x: layer(layer(x)),
    "form": lambda layer, x: layer(x) * len(layer.weight.T) + layer.weight[0].numel(),
    "no numbers": lambda layer, x: layer(x) if not torch.isnan(layer.weight).any() and (layer.weight < 1e9).all() else None,
    "number": lambda layer, x: layer(x) * layer.weight.norm().item(),
    "penalty": lambda layer, x: layer(x) + 1e-4 * penalty(layer.weight),
    "all parameters": lambda layer, x: layer(x) + nn.utils.parameters_to_vector(layer.parameters()).norm(),
    "clamped": lambda layer, x: (layer.weight.data.clamp_(-1, 1), layer(x))[1],
    "assigned": lambda layer, x: assigned(layer)(x),
    "gradients": lambda layer, x: (layer.weight.requires_grad_(True), layer(x))[1],
    "without hooks": lambda layer, x: layer(x) + layer.forward(x),
}


class Tied(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.use = nn.Linear(16, 16), use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.layer, x)


def plain(use: Use) -> nn.Module:
    return Tied(use)


def masked(use: Use) -> nn.Module:
    return bp.apply_masks(Tied(use), bp.recipes.magnitude(WHERE)(Tied(use), 0.5).masks)


def normed(use: Use) -> nn.Module:
    model = Tied(use)
    nn.utils.parametrizations.weight_norm(model.layer)
    return model


def collect(model: nn.Module, *statistics: bp.statistics.Statistic, where: Any = WHERE, **options: Any) -> bp.Data:
    return bp.collect.with_statistics(model, where=where, statistics=statistics, **{"batches": [X, X], "progress": False} | options)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", [plain, masked, normed])
def test_a_weight_that_the_forward_also_uses_itself_is_refused(make: Callable[[Use], nn.Module], use: Use) -> None:
    model = make(use)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=r"layer\.weight \(16, 16\): the forward calls its Linear, and also computes"):
        collect(model, bp.statistics.input_gram)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("make", [plain, masked, normed])
def test_what_reads_no_values_is_no_use(make: Callable[[Use], nn.Module], look: Use) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(make(look), bp.statistics.input_gram)


def test_heuristics_of_inputs_warn_and_gradients_count_all_uses() -> None:
    model = Tied(USES["transposed"])
    with pytest.warns(UserWarning, match="input_sq would describe the calls alone"):
        data = collect(model, bp.statistics.input_sq)
    torch.testing.assert_close(data["layer.weight"].stats["input_sq"][0], X.square().mean(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(model, bp.statistics.gate_grad, loss=lambda output, batch: output.square().mean())


def test_a_penalty_of_the_loss_is_no_use() -> None:
    model = Tied(lambda layer, x: layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(
            model,
            bp.statistics.input_gram,
            bp.statistics.output_grad_gram,
            loss=lambda output, batch: (output - batch @ model.layer.weight.detach()).square().mean() + penalty(model.layer.weight),
        )


def test_buffers_are_no_activations() -> None:
    model = Tied(lambda layer, x: (layer.average.mul_(0.9).add_(layer.weight.detach(), alpha=0.1), layer(x))[1])
    model.layer.register_buffer("average", torch.zeros(16, 16))
    batches = [X]
    collect(model, bp.statistics.input_gram, batches=batches)
    bp.recipes.sparsegpt(WHERE, bp.Calibration(batches, progress=False))(nn.Sequential(model), 0.5)


def test_a_convolution_called_without_hooks_is_no_other_use() -> None:
    for conv in (nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3, padding=1, bias=False)):
        model = Tied(lambda layer, x: layer(x) + layer.forward(x))
        model.layer = conv  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            collect(model, bp.statistics.input_sq, where=bp.named("layer.weight", (4, 4)), batches=[torch.ones(1, 4, 6, 6)])


def test_repair_and_convolutions() -> None:
    model = Tied(lambda layer, x: F.linear(layer(x).relu(), layer.weight.T))
    for recipe in (
        bp.recipes.obs(WHERE, bp.Calibration([X], loss=lambda y, x: (y - x).square().mean(), progress=False)),
        bp.recipes.sparsegpt(WHERE, bp.Calibration([X], progress=False)),
        bp.recipes.sparsegpt(WHERE, bp.Calibration([X], progress=False), target="pruned"),
    ):
        with pytest.raises(NotImplementedError, match=r"layer\.weight"):
            recipe(nn.Sequential(model), 0.5)
    conv = Tied(lambda layer, x: F.conv_transpose2d(layer(x), layer.weight))
    conv.layer = nn.Conv2d(4, 8, 3)  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="the forward calls its Conv2d"):
        collect(conv, bp.statistics.input_gram, where=bp.convs((4, 4)), batches=[torch.ones(1, 4, 6, 6)])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("target", ["dense", "pruned"])
def test_repair_of_convolutions_reads_no_weights_itself(groups: int, target: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU(), nn.Conv2d(8, 4, (1, 3), dilation=2, groups=groups))
    recipe = bp.recipes.sparsegpt(bp.convs((2, 2)), bp.Calibration([torch.randn(4, 4, 9, 9)] * 2, progress=False), target=target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bp.sparsity(recipe(model, 0.5).masks) == pytest.approx(0.5, abs=0.05)


class Attention(nn.Module):
    """Modules that read the weights of their own submodules, and a head that is tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 8), nn.LSTM(8, 8, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.layer(self.norm(self.embedding(tokens))[0]))


@pytest.mark.parametrize("is_masked", [False, True])
def test_modules_that_share_or_own_a_weight_may_read_it(is_masked: bool) -> None:
    model = Attention()
    attention = bp.including(bp.first_of(bp.linears((4, 4)), bp.named("*proj*weight", (4, 4))), "layer.*", "embedding.*")
    if is_masked:
        bp.apply_masks(model, bp.recipes.magnitude(attention)(model, 0.5).masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = collect(model, bp.statistics.input_gram, where=attention, batches=[torch.arange(16).view(2, 8)])
    assert "layer.self_attn.out_proj.weight" in data
    assert "layer.self_attn.in_proj_weight" in data


def test_a_layer_that_is_only_read_is_not_called() -> None:
    with pytest.raises(ValueError, match="the forward never calls its Linear"):
        collect(Tied(lambda layer, x: x @ layer.weight), bp.statistics.input_gram)

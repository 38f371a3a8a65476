"""Units, channels and heads are pruned in everything that has them, and `shrink` then makes the model smaller, with the same outputs."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune as bp
from blockprune.export import shrink

hf = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randomized_norms(model: nn.Module) -> nn.Module:
    """A model whose norms have statistics, weights and biases as after training."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            for tensor in (module.weight, module.bias):
                nn.init.normal_(tensor, 0.5, 0.3)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def checked_shrink(model: nn.Module, masks: bp.Masks, example: Any, other: Any, **options: Any) -> Any:
    """What `shrink` makes of the masked model, after a check on inputs that it did not get."""
    masked = bp.apply_masks(copy.deepcopy(model), masks)
    result = shrink(masked, example, **options)
    with torch.no_grad():
        a, b = (y.logits if "logits" in dir(y) else y for y in (result.model(other), masked(other)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    return result


class Block(nn.Module):
    """A bottleneck of ResNet, with a projection where the width changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.downsample = None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.layers = nn.Sequential(Block(10, 10, 20, 1), Block(20, 10, 20, 1), Block(20, 20, 40, 2), Block(40, 20, 40, 1))
        self.fc = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def channels(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def test_three_tenths_of_the_channels_of_a_resnet_go() -> None:
    model, x = randomized_norms(ResNet()), torch.randn(2, 3, 8, 8)
    axes = bp.find_axes(model, x)
    masks = bp.recipes.structured(axes)(model, 0.3).masks
    result = checked_shrink(model, masks, x, torch.randn(3, 3, 8, 8))
    assert channels(result.model) == {name: round(0.7 * width) for name, width in channels(model).items()}
    assert [norm.num_features for norm in result.model.modules() if isinstance(norm, nn.BatchNorm2d)] == [*channels(result.model).values()]
    assert not result.kept
    assert sum(p.numel() for p in result.model.parameters()) < 0.55 * sum(p.numel() for p in model.parameters())


def test_a_channel_goes_in_its_filter_its_norm_and_the_filters_that_read_it() -> None:
    model, x = randomized_norms(ResNet()), torch.randn(2, 3, 8, 8)
    masks = bp.recipes.structured(bp.find_axes(model, x))(model, 0.3).masks
    keep = {name: bp.expand(mask.keep, mask.grid) for name, mask in masks.items()}
    inner = keep["layers.0.bn1.weight"]
    assert int(inner.sum()) == 7
    assert torch.equal(inner, keep["layers.0.bn1.bias"])
    assert torch.equal(inner, keep["layers.0.conv1.weight"].flatten(1).any(1))
    assert torch.equal(inner, keep["layers.0.conv2.weight"].flatten(2).any(2).any(0))
    stream = keep["layers.0.bn3.weight"]  # joined by residual connections
    for name in ("layers.0.bn3.bias", "layers.0.downsample.1.weight", "layers.1.bn3.weight", "layers.1.bn3.bias"):
        assert torch.equal(stream, keep[name])
    for name in ("layers.1.conv1.weight", "layers.2.conv1.weight", "layers.2.downsample.0.weight"):
        assert torch.equal(stream, keep[name].flatten(2).any(2).any(0))


def test_channels_of_all_layers_can_be_ranked_together() -> None:
    model, x = randomized_norms(ResNet()), torch.randn(2, 3, 8, 8)
    recipe = bp.recipes.structured(axes := bp.find_axes(model, x))
    together = partial(bp.allocate.per_model, coupled=axes, max_sparsity=0.8)
    masks = attrs.evolve(recipe, pipeline=attrs.evolve(recipe.pipeline, allocate=together))(model, 0.3).masks
    widths = channels(checked_shrink(model, masks, x, torch.randn(3, 3, 8, 8)).model)
    assert len({round(widths[name] / width, 1) for name, width in channels(model).items()}) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers and what it imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sparsity", [{"*.attention.*": 1 / 3, "*": 0}, 1 / 3], ids=["heads", "heads and units"])
def test_a_third_of_the_heads_of_bert_goes(sparsity: float | Mapping[str, float]) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 48}
    model = randomized_norms(hf.BertForSequenceClassification(hf.BertConfig(**sizes)))
    example, other = torch.randint(48, (3, 9)), torch.randint(48, (2, 5))
    recipe = bp.recipes.structured(bp.find_axes(model, example))
    result = checked_shrink(model, recipe(model, sparsity).masks, example, other, uniform=False)
    layers = result.model.bert.encoder.layer
    assert [layer.attention.self.num_attention_heads for layer in layers] == [4, 4]
    for layer in layers:
        attention = layer.attention
        widths = [getattr(attention.self, name).out_features for name in ("query", "key", "value")]
        assert [*widths, attention.output.dense.in_features, attention.self.all_head_size] == [32] * 5
        assert layer.intermediate.dense.out_features == layer.output.dense.in_features == (60 if isinstance(sparsity, dict) else 40)
    assert result.model.bert.embeddings.word_embeddings.embedding_dim == 48  # a LayerNorm joins the channels of the stream


class Attention(nn.Module):
    """Attention as in timm: one Linear for queries, keys and values."""

    def __init__(self, width: int, heads: int, fixed: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.scale = heads, width // heads, width, (width // heads) ** -0.5
        self.qkv, self.proj, self.fixed = nn.Linear(width, 3 * width), nn.Linear(width, width), fixed

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v if self.fixed else F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(*x.shape[:2], x.shape[2] if self.fixed else self.attn_dim))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, fixed: bool) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads, fixed), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, layers and a head; ``fixed`` computes the width of all heads from the layer's input."""

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.randn(1, 1, 24))
        self.positions = nn.Parameter(torch.randn(1, 5, 24))
        self.blocks = nn.Sequential(*(Layer(24, 6, fixed) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


def test_a_third_of_the_heads_goes_where_one_linear_computes_queries_keys_and_values() -> None:
    model, x = randomized_norms(VisionTransformer()), torch.randn(2, 3, 8, 8)
    recipe = bp.recipes.structured(bp.find_axes(model, x))
    result = checked_shrink(model, recipe(model, {"*.attn.*": 1 / 3, "*": 0.25}).masks, x, torch.randn(3, 3, 8, 8))
    assert not result.kept
    for layer in result.model.blocks:
        attn = layer.attn
        assert (attn.num_heads, attn.qkv.out_features, attn.proj.in_features, attn.attn_dim) == (4, 48, 16, 16)
        assert layer.fc1.out_features == layer.fc2.in_features == 36


def test_heads_whose_width_the_code_takes_from_its_input_stay_and_are_reported() -> None:
    model, x = randomized_norms(VisionTransformer(fixed=True)), torch.randn(2, 3, 8, 8)
    recipe = bp.recipes.structured(bp.find_axes(model, x))
    result = checked_shrink(model, recipe(model, {"*.attn.*": 1 / 3, "*": 0}).masks, x, torch.randn(3, 3, 8, 8))
    assert not result.removed
    assert {"blocks.0.attn.qkv", "blocks.0.attn.proj"} <= {units.layer for units in result.kept}
    assert all("cannot run (RuntimeError: shape" in units.reason for units in result.kept)


def test_no_axis_is_emptied_and_none_to_prune_is_an_error() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    masks = bp.recipes.structured(bp.find_axes(model, x))(model, 0.99).masks
    assert int(masks["0.weight"].keep.sum()) == 1
    with pytest.raises(ValueError, match="axes has no axis; no unit can be removed from this model"):
        bp.recipes.structured([])


def test_the_recipe_prints_in_a_few_short_lines() -> None:
    model, x = randomized_norms(ResNet()), torch.randn(2, 3, 8, 8)
    text = repr(bp.recipes.structured(axes := bp.find_axes(model, x)))
    assert f"units(axes=({len(axes)} UnitPermutation))" in text
    assert len(text) < 250


def test_other_metrics_rank_the_same_units_and_a_masked_model_can_be_pruned_further() -> None:
    model, x = randomized_norms(ResNet()), torch.randn(8, 3, 8, 8)
    axes = bp.find_axes(model, x)
    calibration = bp.Calibration([x], loss=lambda output, batch: output.square().mean(), progress=False)
    look = partial(bp.collect.with_statistics, where=bp.units(axes), calibration=calibration)
    for metric in (bp.metric.taylor, bp.metric.fisher, bp.metric.snip):
        prune = bp.Pipeline(look, metric, partial(bp.allocate.per_layer, coupled=axes))
        masked, before = copy.deepcopy(model), {}
        for sparsity in (0.2, 0.4):
            scores = bp.restrict(prune.scores(masked), before)
            bp.apply_masks(masked, masks := prune.allocate(scores, sparsity))
            assert all((mask.keep <= before[name].keep).all() for name, mask in masks.items() if name in before)
            before = masks
        widths = channels(shrink(masked, x).model)
        assert widths == {name: round(0.6 * width) for name, width in channels(model).items()}


def test_what_is_no_axis_is_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8)).eval()
    for wrong in (model, bp.UnitPermutation(torch.arange(2)), "0.weight", [("a", "b")]):
        with pytest.raises(TypeError, match=r"axes is \w+ and must be a list of hidden axes, as bp.find_axes\(model, example\) returns"):
            bp.recipes.structured(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axes has 1 hidden axes, whose units norms or softmaxes join"):
        bp.recipes.structured(bp.find_axes(model, torch.randn(3, 8)))

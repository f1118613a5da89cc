"""The maps against their definitions, what is recorded where, and that recording changes nothing else."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fresh import run
from test_imports import BLOCKED
from torch import Tensor, nn

from ocr_kernels import (
    attention_maps,
    modules,
    pixel_region_attention,
    record_maps,
    reference,
    region_maps,
    replace_ocr_modules,
    spatial_gather,
)
from ocr_kernels.attention.registration import pixel_region_attention_op
from ocr_kernels.gather.registration import spatial_gather_op

SPATIAL = [(7,), (3, 5), (2, 3, 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def head(*, replaced: bool = False) -> nn.Module:
    model = (reference if replaced else modules).OCRHead(8, 3, 8, 4).eval()
    if replaced:
        assert len(replace_ocr_modules(model, blocks=False).replaced) == 2
    return model


def shapes(maps: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(m.shape) for m in maps]


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_are_the_weights_of_the_ops(spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against the formulas in float64, and applied to the other input they give what the ops give."""
    feats, logits, query = (torch.randn(2, n, *spatial, dtype=dtype) for n in (6, 3, 4))
    key, value = torch.randn(2, 4, 3, dtype=dtype), torch.randn(2, 5, 3, dtype=dtype)
    with record_maps() as maps:
        out = spatial_gather(feats, logits, 0.7), pixel_region_attention(query, key, value, 0.3)
        pixel_region_attention(query, key, value)
    (regions,), (attention, default) = maps.regions, maps.attention
    assert regions.dtype == attention.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for ours, by_hand in ((regions, region_maps(logits, 0.7)), (attention, attention_maps(query, key, 0.3))):
        assert ours.shape == (2, 3, *spatial)
        assert torch.equal(ours, by_hand)
    assert torch.equal(default, attention_maps(query, key))
    pixels = logits.double().flatten(2)
    scores = torch.einsum("bdk,bdn->bkn", key.double(), query.double().flatten(2))
    same = functools.partial(torch.testing.assert_close, check_dtype=False, rtol=1e-5, atol=1e-6)
    same(regions.flatten(2), (0.7 * pixels).softmax(2))
    same(attention.flatten(2), (0.3 * scores).softmax(1))
    same(default.flatten(2), (0.5 * scores).softmax(1))
    eps = 8 * torch.finfo(dtype).eps
    close = functools.partial(torch.testing.assert_close, check_dtype=False, rtol=eps, atol=eps)
    close(out[0], torch.einsum("bcn,bkn->bck", feats.double().flatten(2), regions.double().flatten(2)))
    close(out[1].flatten(2), torch.einsum("bck,bkn->bcn", value.double(), attention.double().flatten(2)))


def test_maps_have_gradients_of_their_own() -> None:
    logits, query = (torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    key = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(region_maps, logits)
    assert torch.autograd.gradcheck(attention_maps, (query, key))


def test_maps_are_float32_under_autocast() -> None:
    query, key = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3)
    expected = attention_maps(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_maps(query, key), expected)
        with record_maps() as maps:
            pixel_region_attention(query, key, key)
    assert torch.equal(maps.attention[0], attention_maps(query.bfloat16(), key.bfloat16()))  # what the op was given


def test_channels_last_and_empty() -> None:
    logits = torch.randn(2, 3, 4, 5)
    assert torch.equal(region_maps(logits.to(memory_format=torch.channels_last)), region_maps(logits))
    with record_maps() as maps:
        spatial_gather(logits[:0], logits[:0])
        spatial_gather(logits[..., :0], logits[..., :0])
        pixel_region_attention(logits[:0], logits[:0, :, 0], logits[:0, :, 0])
    assert shapes(maps.regions) == [(0, 3, 4, 5), (2, 3, 4, 0)]
    assert shapes(maps.attention) == [(0, 5, 4, 5)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: region_maps(None), TypeError, "logits must be a tensor, but is NoneType"),
        (lambda x: region_maps(x.int()), TypeError, "logits must be float64, float32, bfloat16 or float16, but is"),
        (lambda x: region_maps(x[0, 0]), ValueError, r"logits must have shape \[B, K, \*S\] with K >= 1, but has"),
        (lambda x: region_maps(x, "a"), TypeError, "scale must be a number or a tensor of one element, but is str"),
        (lambda x: attention_maps(x, x, "a"), TypeError, "scale must be a number or a tensor of one element"),
        (lambda x: attention_maps(x, None), TypeError, "key must be a tensor, but is NoneType"),
        (lambda x: attention_maps(x.int(), x), TypeError, "query must be float64, float32, bfloat16 or float16"),
        (lambda x: attention_maps(x, x.double()), TypeError, "key must have the dtype of query, torch.float32, but"),
        (lambda x: attention_maps(x[0], x), ValueError, r"query must have shape \[B, D, \*S\] with D >= 1, but has"),
        (
            lambda x: attention_maps(x, x[:, :1]),
            ValueError,
            r"key must have shape \[B, D, K\] with K >= 1 beside query",
        ),
        (lambda x: attention_maps(x, x.to("meta")), ValueError, "key must be on the device of query, cpu, but is on"),
    ],
)
def test_what_is_wrong_is_named(call: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4))


@pytest.mark.parametrize("replaced", [False, True])
def test_recording_a_model_changes_neither_outputs_nor_gradients(replaced: bool) -> None:
    model = head(replaced=replaced)
    feats = torch.randn(2, 8, 4, 5)
    queries = []
    block = model.ocr_distri_head.object_context_block
    hooks = [
        part.register_forward_hook(lambda _, __, out: queries.append(out)) for part in (block.f_pixel, block.f_object)
    ]

    def train() -> list[Tensor]:
        model.zero_grad()
        outputs = model(feats)
        sum(out.square().sum() for out in outputs).backward()
        return [*outputs, *(p.grad for p in model.parameters())]

    before = train()
    with record_maps() as maps:
        during = train()
    for hook in hooks:
        hook.remove()
    after = train()
    for one, two, three in zip(before, during, after, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-4)  # without hooks the block is one op
    assert shapes(maps.regions) == shapes(maps.attention) == [(2, 3, 20) if replaced else (2, 3, 4, 5)]
    assert not any(m.requires_grad for m in (*maps.regions, *maps.attention))
    torch.testing.assert_close(maps.regions[0].flatten(2), region_maps(before[0]).flatten(2))
    expected = attention_maps(queries[-2], queries[-1].flatten(2))
    torch.testing.assert_close(maps.attention[0].flatten(2), expected.flatten(2))


def test_calls_are_recorded_in_order_and_only_inside() -> None:
    x = torch.randn(1, 3, 5)
    spatial_gather(x, x)
    with record_maps() as outer:
        spatial_gather(x, x)
        with record_maps() as inner:
            spatial_gather(x, x, 2.0)
            spatial_gather_op(x, x, 3.0, "reference")
        pixel_region_attention_op(x, x, x, None, "reference")
        modules.OCRHead(3, 2, 3, 2)(torch.randn(1, 3, 2, 2))
    spatial_gather(x, x)
    pixel_region_attention(x, x, x)
    reference.OCRHead(3, 2, 3, 2)(torch.randn(1, 3, 2, 2))
    expected = [region_maps(x, scale) for scale in (1.0, 2.0, 3.0)]
    assert len(outer.regions) == 4
    assert all(map(torch.equal, outer.regions, expected))
    assert all(map(torch.equal, inner.regions, expected[1:]))
    assert (len(inner.regions), len(inner.attention), len(outer.attention)) == (2, 0, 2)


def test_an_exception_ends_the_recording() -> None:
    x = torch.randn(1, 3, 5)

    def fail() -> None:
        with record_maps() as maps:
            collected.append(maps)
            spatial_gather(x, x)
            spatial_gather(x, x[:, :, :2])

    collected: list[Any] = []
    with pytest.raises(ValueError, match="logits must have shape"):
        fail()
    spatial_gather(x, x)
    assert len(collected[0].regions) == 1
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_threads_record_for_themselves() -> None:
    x = torch.randn(1, 3, 5)
    with record_maps() as maps:
        thread = threading.Thread(target=spatial_gather, args=(x, x))
        thread.start()
        thread.join()
    assert maps.regions == []


def test_what_is_recorded_does_not_follow_its_input() -> None:
    x = torch.randn(1, 3, 5)
    with record_maps() as maps, torch.inference_mode():
        spatial_gather(x, x)
        expected = region_maps(x)
        x.zero_()
    assert torch.equal(maps.regions[0], expected)


def test_vmap_is_recorded_as_one_batch() -> None:
    x = torch.randn(3, 2, 4, 5)
    with record_maps() as maps:
        torch.vmap(spatial_gather)(x, x)
    assert torch.equal(maps.regions[0], region_maps(x.flatten(0, 1)))


def test_export_and_fake_tensors_record_nothing() -> None:
    model, x = head(), torch.randn(1, 8, 4, 5)
    with record_maps() as maps:
        program = torch.export.export(model, (x,))
        with torch._subclasses.FakeTensorMode():
            spatial_gather(torch.empty(1, 2, 3), torch.empty(1, 2, 3))
    assert (maps.regions, maps.attention) == ([], [])
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("replaced", [False, True])
def test_compiled_models_are_recorded_and_not_compiled_again(replaced: bool) -> None:
    model, x = head(replaced=replaced), torch.randn(1, 8, 4, 5)
    graphs: list[Any] = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        with record_maps() as early:
            compiled(x)
        assert graphs == []
        expected = compiled(x)
        with record_maps() as late:
            outputs = compiled(x)
        compiled(x)
    assert len(graphs) == 1
    torch.testing.assert_close(outputs, expected)
    for maps in (early, late):
        assert (len(maps.regions), len(maps.attention)) == (1, 1)
        torch.testing.assert_close(maps.regions[0].flatten(2), region_maps(expected[0]).flatten(2))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_block_inside_a_compiled_function_raises(fullgraph: bool) -> None:
    def inside(x: Tensor) -> Tensor:
        with record_maps() as maps:
            spatial_gather(x, x)
        return maps.regions[0]

    x = torch.randn(1, 3, 5)
    with pytest.raises(RuntimeError, match="put it around the call" if fullgraph else "in a torch.compile region"):
        torch.compile(inside, backend="eager", fullgraph=fullgraph)(x)
    assert torch.equal(inside(x), region_maps(x))


def test_plots() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb

    from ocr_kernels.plotting import COLOURS, plot_attention, plot_region_maps

    image, names = torch.rand(3, 40, 60), ["sky", "road", "tree", "car", "house"]
    maps = region_maps(torch.randn(1, 5, 10, 15))[0]
    figure = plot_region_maps(image, maps, names)
    assert [axes.get_title() for axes in figure.axes] == [*names, "", "", ""]
    assert [bool(axes.images) for axes in figure.axes] == [True] * 5 + [False] * 3
    assert figure.axes[0].images[0].get_array().shape == (40, 60, 3)
    figure.canvas.draw()

    weights = torch.zeros(5, 10, 15)
    weights[1, :5], weights[4, 5:] = 1, 1
    figure = plot_attention(image, weights, [(0, 59), (39, 0)], names, labels=[2, 4])
    picture, *charts = figure.axes
    assert [text.get_text() for text in picture.texts] == ["1", "2"]
    assert [text.get_position() for text in picture.texts] == [(59, 0), (0, 39)]
    rings = [text.get_bbox_patch().get_edgecolor()[:3] for text in picture.texts]
    assert rings == [pytest.approx(to_rgb(COLOURS[k])) for k in (2, 4)]
    assert [[bar.get_height() for bar in axes.patches] for axes in charts] == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert [axes.get_ylabel() for axes in charts] == ["pixel 1", "pixel 2"]
    assert [label.get_text() for label in charts[-1].get_xticklabels()] == names
    figure.canvas.draw()


def test_plots_of_many_regions_stay_legible() -> None:
    pytest.importorskip("matplotlib")
    from ocr_kernels.plotting import plot_attention, plot_region_maps

    image, maps = torch.rand(3, 8, 12), torch.zeros(150, 2, 3)
    maps[7], maps[149] = 0.25, 0.75
    assert len(plot_region_maps(image, maps[:9]).axes) == 12
    chart = plot_attention(image, maps, [(4, 4)]).axes[1]
    labels = [label.get_text() for label in chart.get_xticklabels()]
    assert len(labels) == 24
    assert {"8", "150"} <= set(labels)
    assert chart.get_xlabel() == "the 24 regions of most weight, of 150"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"image": None}, TypeError, "image must be a tensor, but is NoneType"),
        ({"image": torch.rand(4, 6, 3)}, ValueError, r"image must have shape \[3, H, W\], but has \(4, 6, 3\)"),
        (
            {"maps": torch.rand(2, 6)},
            ValueError,
            r"maps must have shape \[K, h, w\] .* unflattened\), but has \(2, 6\)",
        ),
        ({"names": ["a"]}, ValueError, "names must be one for each of 2 regions, but are 1"),
        ({"pixels": [(4, 0)]}, ValueError, r"pixels must be \(y, x\) inside the image of 4 x 6, but are \[\(4, 0\)\]"),
        ({"pixels": []}, ValueError, r"but are \[\]"),
        ({"labels": [0, 1]}, ValueError, "labels must be one for each of 1 pixels, but are 2"),
        ({"labels": [2]}, ValueError, r"labels must be regions, 0 to 1, but are \[2\]"),
    ],
)
def test_what_cannot_be_drawn_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    from ocr_kernels.plotting import plot_attention, plot_region_maps

    arguments = {"image": torch.rand(3, 4, 6), "maps": torch.rand(2, 2, 3)} | changed
    with pytest.raises(error, match=message):
        plot_attention(**{"pixels": [(0, 0)]} | arguments)
    if not changed.keys() & {"pixels", "labels"}:
        with pytest.raises(error, match=message):
            plot_region_maps(**arguments)


def test_without_matplotlib_the_extra_is_named() -> None:
    code = BLOCKED.format(names=["matplotlib"]) + (
        "import torch; from ocr_kernels.plotting import plot_region_maps\n"
        "try:\n    plot_region_maps(torch.rand(3, 4, 6), torch.rand(2, 2, 3))\n"
        "except ImportError as error:\n    print(error)"
    )
    assert run(code) == "drawing needs matplotlib: pip install matplotlib\n"


def test_importing_does_not_load_the_compiler() -> None:
    assert run("import sys, ocr_kernels, ocr_kernels.plotting; print('torch._dynamo' in sys.modules)") == "False\n"

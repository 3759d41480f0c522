"""The contract of a torchvision transform, as properties."""

import copy
import inspect
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from oag_transform import DivergenceError, OnlineAlternateGenerator
from oag_transform.images import IMAGENET_MEAN, to_model_units, to_pixels
from oag_transform.streams import index_of
from tests.sample_images import rand


def small(**overrides: object) -> OnlineAlternateGenerator:
    arguments = {"network_steps": 3, "filters": 4, "kernel_size": 9, "seed": 0} | overrides
    return OnlineAlternateGenerator(**arguments)  # type: ignore[arg-type]


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
sizes = st.integers(9, 20)
channels = st.sampled_from([1, 3])


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 2), max_size=2),
    channels=channels,
    height=sizes,
    width=sizes,
    dtype=st.sampled_from([*FLOATS, torch.uint8]),
    wrap=st.booleans(),
    seed=st.sampled_from([None, 5]),
)
def test_same_kind_shape_dtype_and_input_untouched(
    leading: list[int], channels: int, height: int, width: int, dtype: torch.dtype, wrap: bool, seed: int | None
) -> None:
    values = rand(*leading, channels, height, width)
    images = (255 * values).round().to(dtype) if dtype == torch.uint8 else values.to(dtype)
    images = tv_tensors.Image(images) if wrap else images
    before = images.clone()
    purified = small(seed=seed)(images)
    assert type(purified) is type(images)
    assert (purified.shape, purified.dtype, purified.device) == (images.shape, images.dtype, images.device)
    assert purified.data_ptr() != images.data_ptr() or images.numel() == 0
    assert torch.equal(images, before)
    if images.numel():
        assert not torch.equal(purified, images)
        assert purified.double().isfinite().all()
        assert purified.min() >= 0
        assert purified.max() <= (255 if dtype == torch.uint8 else 1)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 4), channels=channels, height=sizes, width=sizes, index=st.integers(0, 1000), seed=st.integers(0, 2**64)
)
def test_a_row_of_a_batch_is_the_image_alone(n: int, channels: int, height: int, width: int, index: int, seed: int) -> None:
    images = rand(n, channels, height, width)
    purified = small(seed=seed, chunk_size=1)(images, index=index)
    for i in range(n):
        assert torch.equal(purified[i], small(seed=seed)(images[i], index=index + i))


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 5), chunk_size=st.integers(1, 6), height=sizes, width=sizes)
def test_chunks_change_nothing_but_rounding(n: int, chunk_size: int, height: int, width: int) -> None:
    images = rand(n, 3, height, width, dtype=torch.float64)
    expected = small()(images)
    torch.testing.assert_close(small(chunk_size=chunk_size)(images), expected, rtol=0, atol=1e-9)
    traced = list(small(chunk_size=chunk_size).trace(images))[-1]
    torch.testing.assert_close(traced.images, expected, rtol=0, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(permutation=st.permutations(range(4)))
def test_equal_streams_follow_a_permutation(permutation: list[int]) -> None:
    images = rand(4, 3, 12, 12)
    for i, j in enumerate(permutation):
        assert torch.equal(small(chunk_size=1)(images[permutation], index=0)[i], small()(images[j], index=i))


def test_streams_differ_between_images_seeds_and_calls() -> None:
    image = rand(3, 16, 16)
    a, b = small()(torch.stack([image, image]))
    assert not torch.equal(a, b)
    assert not torch.equal(small(seed=0)(image, index=1), small(seed=1)(image, index=0))  # seed + index would be equal
    fresh = small(seed=None)
    assert not torch.equal(fresh(image), fresh(image))
    assert torch.equal(small()(image), small()(image))


@pytest.mark.parametrize("seed", [None, 3])
def test_global_random_state_is_untouched(seed: int | None) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    small(seed=seed)(rand(3, 16, 16))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(2)
    assert torch.equal(small(seed=3)(rand(3, 16, 16)), small(seed=3)(rand(3, 16, 16)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pil(mode: str) -> None:
    array = (255 * rand(14, 17, 3)).byte().numpy() if mode == "RGB" else (255 * rand(14, 17)).byte().numpy()
    image = PIL.Image.fromarray(array)
    purified = small()(image)
    assert isinstance(purified, PIL.Image.Image)
    assert (purified.size, purified.mode) == (image.size, mode)
    assert np.array_equal(np.asarray(image), array)
    tensor = v2.functional.pil_to_tensor(image)
    assert torch.equal(v2.functional.pil_to_tensor(purified), small()(tensor))


def test_kinds_agree() -> None:
    levels = (255 * rand(2, 3, 15, 15)).round()
    expected = small()(levels / 255)
    assert (small()(levels.to(torch.uint8)) / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert small()(levels.double() / 255).dtype == torch.float64
    assert torch.equal(small()((levels / 255).half().float()).half(), small()((levels / 255).half()))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: x.flip(0).flip(0),
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["channels_last", "sliced", "flipped", "expanded"],
)
def test_non_contiguous(view: Callable[[Tensor], Tensor]) -> None:
    images = view(rand(2, 3, 14, 14))
    assert torch.equal(small()(images), small()(images.contiguous()))


def test_grad_modes_agree() -> None:
    images = rand(2, 3, 14, 14)
    expected = small()(images)
    with torch.no_grad():
        assert torch.equal(small()(images), expected)
    with torch.inference_mode():
        inference = small()(images.clone())
    assert torch.equal(inference, expected)
    assert torch.equal(small()(images.clone().requires_grad_()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small()(images), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_straight_through_gradient(dtype: torch.dtype) -> None:
    images = rand(2, 3, 14, 14, dtype=dtype).requires_grad_()
    weights = rand(2, 3, 14, 14, seed=1, dtype=dtype)
    (weights * small()(images)).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, weights)


def test_gradient_none_detaches() -> None:
    assert not small(gradient="none")(rand(3, 14, 14).requires_grad_()).requires_grad
    with torch.no_grad():
        assert not small()(rand(3, 14, 14).requires_grad_()).requires_grad


def test_gradient_of_a_tv_tensor() -> None:
    leaf = rand(3, 14, 14).requires_grad_()
    purified = small()(tv_tensors.Image(leaf))
    assert isinstance(purified, tv_tensors.Image)
    assert torch.equal(purified.as_subclass(Tensor), small()(leaf.detach()))


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype of PyTorch
        return torch.nested.nested_tensor([rand(3, 20, 20), rand(3, 12, 20)], layout=layout)


BAD: list[tuple[object, type[Exception], str]] = [
    (rand(3, 20, 20) * 2 - 1, ValueError, r"values in \[0, 1\], got \[-0\.99.*; purify before any normalisation"),
    (rand(3, 20, 20) * 1.04 - 0.02, ValueError, r"got \[-0\.0\d+, 1\.0\d+\]; use clamp\(0, 1\) where a resize"),
    (rand(3, 20, 20) * 4 - 1.9, ValueError, r"got \[-1\.\d+, 2\.\d+\]; purify before any normalisation, or use clamp"),
    (rand(3, 20, 20) * 255, ValueError, r"values in \[0, 1\], got \[0\.\d+, 25\d\.?\d*\]; divide 0-255 images by 255"),
    (torch.full((3, 20, 20), float("nan")), ValueError, "nan.*NaN and infinity are no pixels"),
    (rand(3, 20, 20).index_fill(2, torch.tensor([3]), float("inf")), ValueError, "inf.*are no pixels"),
    (rand(4, 20, 20), ValueError, r"C = 1 or 3, got \(4, 20, 20\)"),
    (rand(20, 20), ValueError, r"shape \(\.\.\., C, H, W\)"),
    (rand(20, 20, 3), ValueError, r"got \(20, 20, 3\)"),
    (rand(3, 8, 20), ValueError, "at least 9 pixels, got 8 x 20"),
    (rand(2, 3, 0, 20), ValueError, "got 0 x 20"),
    (rand(3, 20, 20).to(torch.int64), TypeError, "got torch.int64"),
    (rand(3, 20, 20).to(torch.complex64), TypeError, "got torch.complex64"),
    (rand(3, 20, 20).to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
    (nested(torch.strided), TypeError, "a dense tensor, got a nested one; give its images one by one"),
    (nested(torch.jagged), TypeError, "a dense tensor, got a nested one"),
    (rand(3, 20, 20).to_sparse(), TypeError, "a dense tensor with values, got layout torch.sparse_coo on device cpu"),
    (rand(3, 20, 20).to("meta"), TypeError, "a dense tensor with values, got layout torch.strided on device meta"),
    (np.zeros((3, 20, 20), np.float32), TypeError, "got ndarray"),
    ("cat.jpg", TypeError, "got str"),
    (None, TypeError, "got NoneType"),
    (tv_tensors.Mask(torch.zeros(3, 20, 20)), TypeError, "got Mask"),
    (PIL.Image.new("RGBA", (20, 20)), ValueError, "got mode RGBA"),
    (PIL.Image.new("P", (20, 20)), ValueError, "convert"),
    (PIL.Image.new("I;16", (20, 20)), ValueError, r"convert\('RGB'\) would clip it"),
    (PIL.Image.new("RGB", (20, 5)), ValueError, "got 5 x 20"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_images_are_refused_before_any_work(
    images: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oag_transform.transform.synthesise", lambda *_, **__: pytest.fail("work began"))
    for call in (small(), small().trace):
        with pytest.raises(error, match=message):
            call(images)


def test_rounding_beyond_the_range_is_accepted() -> None:
    assert small()(torch.full((3, 12, 12), 1 + 1e-6)).shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("network_steps", 0, "network_steps must be an integer >= 1, got 0"),
        ("network_steps", 2.0, "got 2.0"),
        ("image_steps", -1, "image_steps"),
        ("filters", True, "filters"),
        ("kernel_size", 1, "got kernel_size=1, and the default of stride is 3 for 128 x 128 pixels and 2 for 32 x 32 pixels"),
        ("step_size", 1.0, "step_size must be a finite number >= 0 and < 1, got 1.0"),
        ("step_size", float("nan"), "step_size must be a finite number"),
        ("conv_lr", -1e-3, "conv_lr"),
        ("fc_lr", "0.1", "fc_lr"),
        ("threshold", -1, "threshold must be a finite number >= 0, got -1"),
        ("scale", 0, "scale must be a finite number > 0"),
        pytest.param("scale", 10**400, "scale must be a finite number > 0", id="beyond every float"),
        ("strength", 0, "strength must be a finite number > 0 and <= 1, got 0"),
        ("strength", 1.01, "strength must be a finite number > 0 and <= 1, got 1.01"),
        ("strength", "auto", "strength must be a finite number"),
        ("strength", float("nan"), "strength must be a finite number"),
        (
            "compute_dtype",
            torch.float16,
            r"compute_dtype must be one of \(None, torch.float32, torch.bfloat16\), got torch.float16",
        ),
        ("compute_dtype", "bfloat16", "compute_dtype"),
        ("init", "xavier", "init must be one of"),
        ("langevin", "fast", "langevin must be one of"),
        ("backend", "cuda", "backend must be one of"),
        ("seed", -1, "seed must be None or an integer >= 0, got -1"),
        ("seed", 1.5, "seed"),
        ("chunk_size", 0, "chunk_size must be an integer >= 1"),
        ("gradient", "bpda", "gradient must be"),
        ("on_failure", "ignore", "on_failure must be"),
    ],
)
def test_bad_hyper_parameters(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**{argument: value})


def test_numpy_numbers_are_numbers() -> None:
    transform = small(seed=np.int64(3), scale=np.float32(6), network_steps=np.int32(2), fc_lr=np.float64(0.06))
    assert repr(transform) == repr(small(seed=3, scale=6.0, network_steps=2, fc_lr=0.06))
    assert torch.equal(transform(rand(3, 12, 12), index=np.int64(2)), transform(rand(3, 12, 12), index=2))
    assert repr(small(scale=Fraction(13, 2))) == repr(small(scale=6.5))
    with pytest.raises(ValueError, match="filters must be an integer >= 1, got"):
        small(filters=np.float64(3))


def test_arguments_are_attributes_that_cannot_be_set() -> None:
    transform = small(network_steps=5)
    assert (transform.network_steps, transform.seed, transform.step_size) == (5, 0, 0.3)
    for name in ("network_steps", "seed", "progress"):
        with pytest.raises(
            AttributeError, match=rf"{name} can't be set; make another OnlineAlternateGenerator\({name}=50, ...\)"
        ):
            setattr(transform, name, 50)
    with pytest.raises(AttributeError, match="no attribute 'networksteps'"):
        _ = transform.networksteps
    makes: tuple[Callable[..., Any], ...] = (OnlineAlternateGenerator, OnlineAlternateGenerator.paper)
    for make in makes:
        message = "OnlineAlternateGenerator has no argument 'netwrok_steps'; did you mean network_steps"
        with pytest.raises(TypeError, match=message):
            make(netwrok_steps=3)
        with pytest.raises(TypeError, match=r"OnlineAlternateGenerator has no argument 'colour'$"):
            make(colour=3)


def test_help_shows_every_argument_with_its_default_and_meaning() -> None:
    shown = inspect.signature(OnlineAlternateGenerator).parameters
    assert {"network_steps", "threshold", "backend", "seed", "on_failure"} <= shown.keys()
    text = inspect.getdoc(OnlineAlternateGenerator) or ""
    built = OnlineAlternateGenerator()
    for name, parameter in shown.items():
        assert parameter.default == getattr(built, name)
        assert f"\n    {name}: " in text
        assert f"{name}=" in repr(built)
        assert name in dir(built)


def test_streams_for_each_image() -> None:
    images, purify = rand(3, 3, 12, 12), small(chunk_size=1)  # a larger chunk rounds otherwise
    streams_ = [7, index_of("a/cat.jpg"), 2]
    expected = torch.stack([purify(image, index=stream) for image, stream in zip(images, streams_, strict=True)])
    for sequence in (streams_, tuple(streams_), torch.tensor(streams_), np.array(streams_)):
        assert torch.equal(purify(images, index=sequence), expected)
        assert torch.equal(list(purify.trace(images, index=sequence))[-1].images, expected)
    assert index_of("a/cat.jpg") != index_of("b/cat.jpg")
    assert 0 <= index_of("") < 2**63
    assert index_of(os.fsdecode(b"bad\xff.png")) not in (index_of(os.fsdecode(b"bad\xfe.png")), index_of("bad.png"))
    with pytest.raises(TypeError, match="name must be a str, got bytes"):
        index_of(b"cat.jpg")  # type: ignore[arg-type]
    for bad, message in [
        ([1, 2], "one for each of 3 images, got 2"),
        ([1, -1, 2], "got -1"),
        ("abc", "got 'abc'"),
        (1.5, "got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            small()(images, index=bad)


def test_as_a_v2_transform_it_purifies_images_and_passes_everything_else() -> None:
    image = PIL.Image.fromarray((255 * rand(20, 24, 3)).byte().numpy())
    typed = tv_tensors.Image((255 * rand(3, 20, 24)).byte())
    boxes = tv_tensors.BoundingBoxes([[0, 0, 5, 5]], format="XYXY", canvas_size=(20, 24))
    mask, aside = tv_tensors.Mask(torch.ones(20, 24)), rand(4)
    expected = small()(image)
    out, label = v2.Compose([small()])(image, 3)
    assert (out.tobytes(), label) == (expected.tobytes(), 3)
    sample = {"image": typed, "label": 3, "target": {"boxes": boxes, "mask": mask}, "aside": aside}
    done = v2.Compose([v2.RandomApply([small()], p=1.0)])(sample)
    assert torch.equal(done["image"], small()(typed))
    assert done["label"] == 3
    assert done["target"]["boxes"] is boxes
    assert done["target"]["mask"] is mask
    assert done["aside"] is aside
    batch, labels = rand(2, 3, 12, 12), torch.tensor([0, 1])
    pair = small()(batch, labels)
    assert torch.equal(pair[0], small()(batch))
    assert pair[1] is labels
    first, second = small()(image, typed)
    assert first.tobytes() == expected.tobytes()
    assert torch.equal(second, small()(typed, index=1))
    with pytest.raises(TypeError, match=r"expected an image in the sample, got \['str', 'int'\]"):
        small()("cat.jpg", 3)
    with pytest.raises(ValueError, match="got mode RGBA"):
        small()({"image": image.convert("RGBA")})
    with pytest.raises(TypeError, match="a dense tensor, got a nested one"):
        small()({"image": nested(torch.strided)})


def test_gabor_functions_need_two_pixels() -> None:
    with pytest.raises(ValueError, match='init="gabor" needs a kernel_size of at least 2'):
        OnlineAlternateGenerator(kernel_size=1, stride=1)
    dots = OnlineAlternateGenerator(kernel_size=1, stride=1, init="uniform", seed=0)
    assert dots(rand(3, 4, 4)).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="at least 2"):
        dots(rand(3, 1, 4))


def test_an_index_without_dimensions_is_an_integer() -> None:
    image, purify = rand(3, 12, 12), small(seed=0)
    for index in (torch.tensor(3), np.array(3), np.int64(3)):
        assert torch.equal(purify(image, index=index), purify(image, index=3))


def test_a_pil_image_keeps_its_info() -> None:
    image = PIL.Image.new("RGB", (12, 12))
    image.info = {"dpi": (72, 72), "exif": b"Exif"}
    assert small()(image).info == image.info


def test_bad_index_and_every() -> None:
    with pytest.raises(ValueError, match="index must be an integer >= 0, got -1"):
        small()(rand(3, 12, 12), index=-1)
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        small().trace(rand(3, 12, 12), every=0)


def test_pickle_deepcopy_and_repr_rebuild() -> None:
    transform = small(seed=7, scale=6, gradient="none", on_failure="return_input", compute_dtype=torch.bfloat16)
    image = rand(3, 16, 16)
    rebuilt = eval(repr(transform), {"OnlineAlternateGenerator": OnlineAlternateGenerator, "torch": torch})
    for other in (pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform), rebuilt):
        assert repr(other) == repr(transform)
        assert torch.equal(other(image), transform(image))


def test_compose() -> None:
    pipeline = v2.Compose([v2.Resize(24), v2.CenterCrop(20), small(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    out = pipeline(PIL.Image.fromarray((255 * rand(30, 40, 3)).byte().numpy()))
    assert out.shape == (3, 20, 20)
    assert isinstance(nn.Sequential(small())(rand(3, 12, 12)), Tensor)


class Images(Dataset[Tensor]):
    """Four images behind the transform."""

    def __init__(self, transform: OnlineAlternateGenerator) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(rand(3, 12, 12), index=0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one processor
def test_data_loader_workers() -> None:
    seeded = torch.cat(list(DataLoader(Images(small()), num_workers=2)))
    assert torch.equal(seeded, seeded[:1].expand(4, -1, -1, -1))
    # a worker has one thread, which rounds sums differently
    torch.testing.assert_close(seeded[0], small()(rand(3, 12, 12)), rtol=0, atol=1e-4)
    fresh = torch.cat(list(DataLoader(Images(small(seed=None)), num_workers=2)))
    assert len({tuple(image.flatten().tolist()) for image in fresh}) == 4  # forked workers don't share a stream


def test_cuda_in_a_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        small()(rand(3, 12, 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(dtype: torch.dtype) -> None:
    images = rand(3, 3, 20, 20, dtype=dtype).cuda()
    state = torch.cuda.get_rng_state()
    purified = small()(images)
    assert (purified.device, purified.dtype) == (images.device, dtype)
    torch.testing.assert_close(purified[1], small()(images[1], index=1), rtol=0, atol=2e-3)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@given(scale=st.floats(0.5, 64), channels=channels)
def test_model_units_round_trip_and_zero_is_the_mean_colour(scale: float, channels: int) -> None:
    images = rand(1, channels, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(to_pixels(to_model_units(images, scale), scale), images, rtol=0, atol=1e-12)
    mean = to_pixels(torch.zeros(1, channels, 1, 1, dtype=torch.float64), scale)[0, :, 0, 0]
    expected = [m / 255 for m in IMAGENET_MEAN] if channels == 3 else [117 / 255]
    assert mean.tolist() == pytest.approx(expected, abs=1e-12)


def test_default_dtype_does_not_matter() -> None:
    image = rand(3, 14, 14)
    expected = small()(image)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(small()(image), expected)
        assert small()((255 * image).byte()).dtype == torch.uint8
    finally:
        torch.set_default_dtype(torch.float32)


def test_progress_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    bars: list[tqdm] = []

    def keep(**kwargs: Any) -> tqdm:
        bars.append(tqdm(**kwargs))
        return bars[-1]

    monkeypatch.setattr("tqdm.auto.tqdm", keep)
    small(progress=True)(rand(2, 3, 12, 12))
    small(progress=True, tile_size=128)(rand(2, 3, 12, 200))
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6), (12, 12)]
    assert "purify" in capfd.readouterr().err
    small()(rand(2, 3, 12, 12))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_progress_without_tqdm_goes_on_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.warns(UserWarning, match="needs tqdm") as caught:
        purified = small(progress=True)(rand(3, 12, 12))
    assert caught[0].filename == __file__
    assert torch.equal(purified, small()(rand(3, 12, 12)))


class Diverging(Dataset[Tensor]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Tensor:
        raise DivergenceError("image(s) {images}", [3])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_divergence_keeps_its_type_in_a_worker(workers: int) -> None:
    with pytest.raises(DivergenceError, match=r"image\(s\) \[3\]"):
        list(DataLoader(Diverging(), num_workers=workers))


def test_further_tensors_of_the_size_of_the_image_are_a_warning() -> None:
    first, second = rand(3, 12, 12), rand(3, 12, 12, seed=1)
    with pytest.warns(UserWarning, match="only the first plain tensor of a sample is taken as an image"):
        found = small()([first, second])
    assert torch.equal(found[0], small()(first))
    assert torch.equal(found[1], second)
    small()((first, rand(1, 12, 12), torch.zeros(3, 12, 12, dtype=torch.int64)))  # masks and labels are none


def test_a_tensor_that_torchvision_calls_something_else_is_no_image() -> None:
    class Points(tv_tensors.TVTensor):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match=r"expected a PIL image, a tensor or a tv_tensors\.Image, got Points"):
        OnlineAlternateGenerator()(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).as_subclass(Points))

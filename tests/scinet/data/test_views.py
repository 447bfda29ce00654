"""A view depends on (seed, epoch, sample id, view) and on nothing else."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import v2

from scinet.data import views as views_module
from scinet.data.views import VIEW_NAMES, Box, Normalisation, Views, crop_box, cutout_box, decode
from scinet.errors import DataError
from tests.scinet.conftest import MakeImage

NORMALISATION = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def views() -> Views:
    return Views(24, NORMALISATION, smallest_crop=0.5)


@pytest.fixture(scope="module")
def image(make_image: MakeImage) -> Tensor:
    return decode(make_image(1, size=40), "here")


def _one_colour(size: tuple[int, int], colour: tuple[int, int, int]) -> Tensor:
    """Return an image as `decode` does."""
    return torch.from_numpy(np.array(Image.new("RGB", size, colour))).permute(2, 0, 1)


def _jpeg(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> bytes:
    """Return a smooth photograph-like image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _draw(views: Views, image: Tensor, name: str = "strong", **where: int | str) -> Tensor:
    given = {"seed": 0, "epoch": 0, "sample_id": "a"} | where
    return views.random(image, name, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VIEW_NAMES)
def test_view_is_equal_when_drawn_again_after_others(views: Views, image: Tensor, name: str) -> None:
    first = _draw(views, image, name)
    _draw(views, image, "strong", sample_id="b")
    torch.rand(7)
    assert torch.equal(_draw(views, image, name), first)
    again = Views(24, NORMALISATION, smallest_crop=0.5)
    assert torch.equal(_draw(again, image, name), first)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"sample_id": "b"}])
@pytest.mark.parametrize("name", VIEW_NAMES)
def test_view_differs_when_the_seed_the_epoch_or_the_id_does(
    views: Views, image: Tensor, name: str, change: dict[str, int | str]
) -> None:
    assert not torch.equal(_draw(views, image, name), _draw(views, image, name, **change))


def test_views_of_one_image_differ_when_their_names_do(views: Views, image: Tensor) -> None:
    weak, medium, strong = (_draw(views, image, name) for name in VIEW_NAMES)
    assert not torch.equal(weak, medium)
    assert not torch.equal(medium, strong)


@pytest.mark.parametrize("size", [(40, 40), (100, 13), (3, 90), (1, 1)])
def test_view_has_one_shape_when_the_image_has_any(views: Views, size: tuple[int, int]) -> None:
    image = _one_colour(size, (10, 200, 30))
    for tensor in [views.plain(image), *(_draw(views, image, name) for name in VIEW_NAMES)]:
        assert tensor.shape == (3, 24, 24)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_plain_view_is_normalised_per_channel_when_the_image_has_one_colour(views: Views) -> None:
    plain = views.plain(_one_colour((30, 20), (51, 102, 204)))
    expected = [(51 / 255 - 0.5) / 0.2, (102 / 255 - 0.4) / 0.3, (204 / 255 - 0.3) / 0.4]
    torch.testing.assert_close(plain, torch.tensor(expected)[:, None, None].expand(3, 24, 24))


def test_only_the_strong_view_is_cut_out_when_the_image_has_one_colour(views: Views) -> None:
    image = _one_colour((64, 64), (51, 102, 204))
    weak = [_draw(views, image, "weak", sample_id=str(n)) for n in range(8)]
    assert all(torch.allclose(view, views.plain(image)) for view in weak)
    strong = [_draw(views, image, "strong", sample_id=str(n)) for n in range(8)]
    shares = [(view == 0).all(0).float().mean().item() for view in strong]
    assert all(0.03 < share < 0.25 for share in shares)


def test_global_generator_is_left_alone_when_a_view_is_drawn(views: Views, image: Tensor) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name in VIEW_NAMES:
        _draw(views, image, name)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_other_devices_are_left_alone_when_a_view_is_drawn(
    views: Views, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"seeded the accelerators with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    _draw(views, image)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_image_becomes_rgb_when_it_has_another_mode(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (90, 90, 90)).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode(buffer.getvalue(), "here")
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, 7, 9))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_place_is_named_when_an_image_is_cut_off(make_image: MakeImage, kind: str, share: float) -> None:
    content = make_image(0, kind, 64)
    cut = content[: int(share * len(content))]
    with pytest.raises(DataError, match=rf"shard x, sample 'a': .*\({len(cut)} bytes\)"):
        decode(cut, "shard x, sample 'a'")


def test_place_is_named_when_the_bytes_are_no_image() -> None:
    with pytest.raises(DataError, match="here"):
        decode(b"<html>not found</html>", "here")


def test_place_is_named_when_an_image_is_absurdly_large(monkeypatch: pytest.MonkeyPatch, make_image: MakeImage) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="here"):
        decode(make_image(size=64), "here")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_of_a_jpeg_are_pillows_when_it_is_decoded_in_full(mode: str) -> None:
    content = _jpeg((97, 61), mode)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(decode(content, "here").permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("size", "enough", "expected"),
    [
        ((800, 600), 0, (800, 600)),
        ((800, 600), 301, (800, 600)),
        ((800, 600), 300, (400, 300)),
        ((801, 601), 300, (401, 301)),
        ((800, 600), 70, (100, 75)),
        ((800, 600), 1, (100, 75)),
    ],
)
def test_jpeg_is_decoded_small_when_its_shorter_side_keeps_enough(
    size: tuple[int, int], enough: int, expected: tuple[int, int]
) -> None:
    decoded = decode(_jpeg(size), "here", enough_pixels=enough)
    assert (decoded.shape[2], decoded.shape[1]) == expected


def test_view_hardly_differs_when_a_large_image_is_decoded_small() -> None:
    views = Views(24, Normalisation((0.0,) * 3, (1.0,) * 3), smallest_crop=0.5)
    side = 2 * views.enough_pixels
    content = _jpeg((side, side))
    whole, small = decode(content, "here"), decode(content, "here", enough_pixels=views.enough_pixels)
    assert small.shape[2] == side // 2
    pairs = [[_draw(views, image, "weak", sample_id=str(n)) for image in (whole, small)] for n in range(20)]
    other = [_draw(views, whole, "weak", sample_id=str(n + 20)) for n in range(20)]
    # in levels of 255; the crops are rounded to other pixels, which is much in views as small as these
    same = 255 * sum((first - second).abs().mean() for first, second in pairs) / 20
    different = 255 * sum((pair[0] - view).abs().mean() for pair, view in zip(pairs, other, strict=True)) / 20
    assert same < 6
    assert same < different / 4


def test_plain_view_is_pillows_within_one_level() -> None:
    views = Views(24, Normalisation((0.0,) * 3, (1.0,) * 3), smallest_crop=0.5)
    content = _jpeg((97, 61))
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(image.resize((24, 24), Image.Resampling.BILINEAR))
    found = views.plain(decode(content, "here")).permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() < 1.01


@pytest.mark.parametrize("size", [(40, 40), (500, 375), (90, 30), (300, 20)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(24, scale=(0.5, 1.0))
    image = Image.new("RGB", size)
    drawn = [theirs.make_params([image]) for _ in range(1500)]
    mine = [crop_box(random.Random(seed), *size, 0.5) for seed in range(1500)]
    for one, other in (("left", "left"), ("top", "top"), ("width", "width"), ("height", "height")):
        found = ks_2samp([getattr(box, one) for box in mine], [params[other] for params in drawn])
        assert found.pvalue > 1e-4, one


def test_cutouts_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1.0, scale=(0.05, 0.2))
    image = torch.zeros(3, 32, 32)
    drawn = [theirs.make_params([image]) for _ in range(1500)]
    mine = [cutout_box(random.Random(seed), 32) for seed in range(1500)]
    for one, other in (("left", "j"), ("top", "i"), ("width", "w"), ("height", "h")):
        found = ks_2samp([getattr(box, one) for box in mine if box], [params[other] for params in drawn])
        assert found.pvalue > 1e-4, one


def test_half_of_the_views_are_flipped() -> None:
    views = Views(16, NORMALISATION, smallest_crop=0.99)
    ramp = torch.arange(64, dtype=torch.uint8).mul(3).expand(3, 64, 64)
    drawn = [_draw(views, ramp, "weak", sample_id=str(number)) for number in range(400)]
    flipped = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in drawn)
    assert 140 < flipped < 260


def test_drawn_views_are_the_normalised_ones_when_they_are_drawn_together(views: Views, image: Tensor) -> None:
    drawn = views.draw(image, VIEW_NAMES, seed=0, epoch=0, sample_id="a")
    together = torch.full((3, 3, 24, 24), torch.nan)
    views.normalise(drawn, together)
    for view, name in zip(together, VIEW_NAMES, strict=True):
        assert torch.equal(view, _draw(views, image, name))


def test_every_view_has_a_crop_and_a_flip_of_its_own(
    views: Views, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[Box] = []

    def keep(*arguments: Any) -> Box:
        boxes.append(crop_box(*arguments))
        return boxes[-1]

    monkeypatch.setattr(views_module, "crop_box", keep)
    for sample_id in ("a", "b"):
        views.draw(image, VIEW_NAMES, seed=1, epoch=2, sample_id=sample_id)
    assert len(boxes) == len(set(boxes)) == 6


def test_views_are_augmented_as_strongly_as_they_are_called(views: Views, image: Tensor) -> None:
    assert {name: operation.num_ops for name, operation in views._augment.items()} == {"medium": 1, "strong": 3}
    cutouts = [views.draw(image, VIEW_NAMES, seed=0, epoch=0, sample_id=str(number)).cutouts for number in range(20)]
    weak, medium, strong = zip(*cutouts, strict=True)
    assert set(weak) == set(medium) == {None}
    assert None not in strong
    assert len(set(strong)) > 10

"""A view depends on (seed, epoch, sample id, view) and on nothing else."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from scinet.data.views import VIEW_NAMES, Normalisation, Views, decode
from scinet.errors import DataError
from tests.scinet.conftest import MakeImage

NORMALISATION = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def views() -> Views:
    return Views(24, NORMALISATION, smallest_crop=0.5)


@pytest.fixture(scope="module")
def image(make_image: MakeImage) -> Image.Image:
    return decode(make_image(1, size=40), "here")


def _draw(views: Views, image: Image.Image, name: str = "strong", **where: int | str) -> Tensor:
    given = {"seed": 0, "epoch": 0, "sample_id": "a"} | where
    return views.random(image, name, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VIEW_NAMES)
def test_view_is_equal_when_drawn_again_after_others(views: Views, image: Image.Image, name: str) -> None:
    first = _draw(views, image, name)
    _draw(views, image, "strong", sample_id="b")
    torch.rand(7)
    assert torch.equal(_draw(views, image, name), first)
    again = Views(24, NORMALISATION, smallest_crop=0.5)
    assert torch.equal(_draw(again, image, name), first)


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"sample_id": "b"}])
@pytest.mark.parametrize("name", VIEW_NAMES)
def test_view_differs_when_the_seed_the_epoch_or_the_id_does(
    views: Views, image: Image.Image, name: str, change: dict[str, int | str]
) -> None:
    assert not torch.equal(_draw(views, image, name), _draw(views, image, name, **change))


def test_views_of_one_image_differ_when_their_names_do(views: Views, image: Image.Image) -> None:
    weak, medium, strong = (_draw(views, image, name) for name in VIEW_NAMES)
    assert not torch.equal(weak, medium)
    assert not torch.equal(medium, strong)


@pytest.mark.parametrize("size", [(40, 40), (100, 13), (3, 90), (1, 1)])
def test_view_has_one_shape_when_the_image_has_any(views: Views, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    for tensor in [views.plain(image), *(_draw(views, image, name) for name in VIEW_NAMES)]:
        assert tensor.shape == (3, 24, 24)
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_plain_view_is_normalised_per_channel_when_the_image_has_one_colour(views: Views) -> None:
    plain = views.plain(Image.new("RGB", (30, 20), (51, 102, 204)))
    expected = [(51 / 255 - 0.5) / 0.2, (102 / 255 - 0.4) / 0.3, (204 / 255 - 0.3) / 0.4]
    torch.testing.assert_close(plain, torch.tensor(expected)[:, None, None].expand(3, 24, 24))


def test_only_the_strong_view_is_cut_out_when_the_image_has_one_colour(views: Views) -> None:
    image = Image.new("RGB", (64, 64), (51, 102, 204))
    weak = [_draw(views, image, "weak", sample_id=str(n)) for n in range(8)]
    assert all(torch.allclose(view, views.plain(image)) for view in weak)
    strong = [_draw(views, image, "strong", sample_id=str(n)) for n in range(8)]
    shares = [(view == 0).all(0).float().mean().item() for view in strong]
    assert all(0.03 < share < 0.25 for share in shares)


def test_global_generator_is_left_alone_when_a_view_is_drawn(views: Views, image: Image.Image) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name in VIEW_NAMES:
        _draw(views, image, name)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_of_other_devices_are_left_alone_when_a_view_is_drawn(
    views: Views, image: Image.Image, monkeypatch: pytest.MonkeyPatch
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
    assert (decoded.mode, decoded.size) == ("RGB", (9, 7))


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

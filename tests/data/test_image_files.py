"""From files of every kind to the square of pixels that a codec takes; and from tensors to grids and files that say how they were made."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from madformer.data.codec import MAX_GRID, MIN_SIDE, read_settings, save_png, to_grid, to_pixels, to_tiles
from madformer.data.image_files import decode_image, load_square, square_image, to_unit
from madformer.errors import BadImage
from tests.pictures import as_bytes, picture


def adm(image: Image.Image, size: int) -> np.ndarray:
    """What guided-diffusion does to an image of ImageNet, as its authors wrote it: [size, size, 3]."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    crop_y, crop_x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(width * 1000 + height)
    smooth = np.linspace(0, 190, width)[None, :, None] + np.zeros((height, 1, channels))
    return (smooth + generator.random((height, width, channels)) * 60).astype(np.uint8)


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 24))
@example(width=64, height=64, size=16)
@example(width=47, height=33, size=16)
@example(width=5, height=90, size=24)
def test_squares_are_those_of_adm(width, height, size):
    image = Image.fromarray(noise(width, height))
    square = square_image(image, size)
    assert square.shape == (3, size, size) and square.dtype == torch.uint8 and square.is_contiguous()
    assert np.array_equal(square.permute(1, 2, 0).numpy(), adm(image, size))


def test_an_image_of_the_right_size_is_left_as_it_is():
    square = noise(16, 16)
    assert np.array_equal(load_square(as_bytes(Image.fromarray(square)), 16).permute(1, 2, 0), square)
    wide = noise(30, 16)
    assert np.array_equal(load_square(as_bytes(Image.fromarray(wide)), 16).permute(1, 2, 0), wide[:, 7:23])


def test_the_top_left_square_is_scaled_by_lanczos():
    """As the released code's branch for ImageNet prepares images."""
    pixels = noise(61, 40)
    expected = Image.fromarray(pixels[:, :40]).resize((16, 16), Image.Resampling.LANCZOS)
    square = square_image(Image.fromarray(pixels), 16, "top_left")
    assert square.dtype == torch.uint8 and np.array_equal(square.permute(1, 2, 0), np.array(expected))
    assert not torch.equal(square, square_image(Image.fromarray(pixels), 16))
    assert np.array_equal(load_square(as_bytes(Image.fromarray(pixels)), 40, "top_left").permute(1, 2, 0), pixels[:, :40])


def test_a_thread_of_pixels_is_refused():
    with pytest.raises(BadImage, match="60000 x 1 pixels: too thin for a square of 256"):
        square_image(Image.new("RGB", (60_000, 1)), 256)


def test_units():
    units = to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert units.dtype == torch.float32 and torch.equal(units, torch.tensor([0, 51, 255]) / 127.5 - 1)
    assert units[0] == -1 and units[-1] == 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_colours_come_back_bit_for_bit(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(decode_image(as_bytes(picture(3), kind, **options))), pixels(picture(3)))


def test_grey_is_the_same_in_all_channels():
    grey = noise(9, 7, 1)[..., 0]
    for image in (Image.fromarray(grey), Image.merge("LA", [Image.fromarray(grey), Image.new("L", (9, 7), 255)])):
        assert np.array_equal(pixels(decode_image(as_bytes(image))), np.repeat(grey[..., None], 3, axis=-1))
    black_and_white = Image.fromarray(grey > 120)
    assert black_and_white.mode == "1"
    assert np.array_equal(pixels(decode_image(as_bytes(black_and_white))), np.repeat((grey > 120)[..., None] * 255, 3, axis=-1))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind, dtype):
    depth = np.array([[0, 257, 12_850, 32_768, 65_278, 65_535]])
    image = Image.fromarray(depth.astype(dtype))
    assert image.mode.startswith("I;16")
    assert pixels(decode_image(as_bytes(image, kind)))[0, :, 0].tolist() == [0, 1, 50, 128, 254, 255]


def test_16_bits_in_integers_and_floats():
    integers = Image.fromarray(np.array([[0, 257, 65_535]], dtype=np.int32))
    assert integers.mode == "I"
    assert pixels(decode_image(as_bytes(integers, "TIFF")))[0, :, 1].tolist() == [0, 1, 255]
    for values in ([0.0, 0.2, 1.0], [0.0, 51.0, 255.0]):
        floats = Image.fromarray(np.array([values], dtype=np.float32))
        assert pixels(decode_image(as_bytes(floats, "TIFF")))[0, :, 2].tolist() == [0, 51, 255]


def transparent() -> dict[str, bytes]:
    """One red pixel, opaque; one red, half transparent; one fully transparent."""
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 128], [255, 0, 0, 0]]], dtype=np.uint8))
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0] * 3)
    palette.putdata([0, 1, 2])
    return {
        "RGBA": as_bytes(rgba),
        "P": as_bytes(palette, transparency=bytes([255, 128, 0])),
        "WEBP": as_bytes(rgba, "WEBP", lossless=True, exact=True),
    }


@pytest.mark.parametrize("kind", ["RGBA", "P", "WEBP"])
def test_what_is_transparent_lies_on_white(kind):
    assert pixels(decode_image(transparent()[kind]))[0].tolist() == [[255, 0, 0], [255, 127, 127], [255, 255, 255]]


def test_transparent_grey_and_one_transparent_colour():
    grey = Image.merge("LA", [Image.new("L", (2, 1), 40), Image.fromarray(np.array([[255, 0]], dtype=np.uint8))])
    assert pixels(decode_image(as_bytes(grey)))[0].tolist() == [[40] * 3, [255] * 3]
    colours = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    assert pixels(decode_image(as_bytes(colours, transparency=(9, 9, 9))))[0].tolist() == [[1, 2, 3], [255] * 3]


def test_a_palette_gives_its_colours():
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([2, 0, 1])
    assert pixels(decode_image(as_bytes(palette)))[0].tolist() == [[70, 80, 90], [10, 20, 30], [40, 50, 60]]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_other_colour_spaces(mode, kind):
    colours = Image.fromarray(np.full((16, 16, 3), (200, 90, 30), dtype=np.uint8))
    content = as_bytes(colours.convert(mode), kind)
    assert np.abs(pixels(decode_image(content)) - (200, 90, 30)).max() <= 4


def test_adobe_jpegs_are_not_negatives():
    content = as_bytes(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG")
    assert b"Adobe" in content  # Pillow writes the marker, and the inverted values that go with it
    assert pixels(decode_image(content)).min() >= 252


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    upright = pixels(picture(1))
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = as_bytes(Image.fromarray(np.ascontiguousarray(stored).astype(np.uint8)), "PNG", exif=exif)
    assert np.array_equal(pixels(decode_image(content)), upright)


def test_broken_exif_says_nothing_about_the_pixels():
    content = as_bytes(picture(1), "PNG", exif=b"Exif\0\0neither II nor MM")
    assert np.array_equal(pixels(decode_image(content)), pixels(picture(1)))


def test_the_first_picture_of_a_moving_one():
    content = as_bytes(picture(1), "WEBP", lossless=True, save_all=True, append_images=[picture(2)])
    assert np.array_equal(pixels(decode_image(content)), pixels(picture(1)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {})],
)
def test_a_file_cut_anywhere_is_whole_or_refused(kind, options):
    """A few last bytes may be missing without harm, such as PNG's end mark; pixels may not."""
    content = as_bytes(Image.fromarray(noise(40, 24)), kind, **options)
    whole, refused = pixels(decode_image(content)), 0
    for length in range(0, len(content), 7):
        try:
            assert np.array_equal(pixels(decode_image(content[:length])), whole), length
        except BadImage as error:
            assert str(error) and "\n" not in str(error) and "0x" not in str(error)
            refused += 1
    assert refused > 0.9 * len(content) / 7


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    content=st.binary(max_size=200),
    place=st.integers(0, 300),
    prefix=st.sampled_from(["", "PNG", "JPEG", "GIF", "TIFF", "WEBP"]),
)
def test_nothing_but_bad_image_is_raised(content, place, prefix):
    if prefix:
        whole = as_bytes(picture(2), prefix)
        content = whole[:place] + content + whole[place + len(content) :]
    try:
        assert decode_image(content).mode == "RGB"
    except BadImage as error:
        assert str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "no image, or of a format that is not read"),
    ],
)
def test_reasons(content, reason):
    with pytest.raises(BadImage) as caught:
        decode_image(content)
    assert str(caught.value) == reason


def test_a_bomb_is_not_unpacked():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    with pytest.raises(BadImage, match="3600000000 pixels"):
        decode_image(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


# Grids and PNG files


def test_pixels_are_rounded_and_clipped():
    levels = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0]).reshape(1, 1, 1, 7)
    assert to_pixels(levels)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_channels(channels, shown):
    images_BCYX = torch.rand(2, channels, 5, 6) * 2 - 1
    pixels_BYX3 = to_pixels(images_BCYX)
    assert pixels_BYX3.shape == (2, 5, 6, 3) and pixels_BYX3.dtype == np.uint8
    for place, channel in enumerate(shown):
        expected = torch.round((images_BCYX[:, channel] + 1) * 127.5)
        assert np.array_equal(pixels_BYX3[..., place], expected.byte().numpy())


def test_a_grid_goes_row_by_row_and_magnifies_small_images():
    values = torch.linspace(-1, 1, 5)
    grid_YX3 = to_grid(values.reshape(5, 1, 1, 1).expand(5, 1, 8, 8))
    tile = MIN_SIDE + 2
    assert grid_YX3.shape == (2 * tile, 3 * tile, 3)
    centres = [int(grid_YX3[row * tile + tile // 2, column * tile + tile // 2, 0]) for row in (0, 1) for column in (0, 1, 2)]
    assert centres == [0, 64, 128, 191, 255, 96], "the last place is empty"
    assert (grid_YX3[0] == 96).all() and (grid_YX3[:, 0] == 96).all()


@pytest.mark.parametrize(
    ("count", "side", "shown"), [(1, 8, 64), (1, 1024, 1024), (4, 1024, 1024), (9, 1024, 512), (64, 1024, 256)]
)
def test_large_images_are_reduced_only_where_there_are_many(count, side, shown):
    pixels_BYX3 = np.zeros((count, side, side, 3), np.uint8)
    pixels_BYX3[:, : side // 2] = 200
    grid_YX3 = to_tiles(pixels_BYX3)
    columns = int(np.ceil(np.sqrt(count)))
    assert grid_YX3.shape == (columns * (shown + 2), columns * (shown + 2), 3) and max(grid_YX3.shape) <= MAX_GRID + 2 * columns
    assert set(np.unique(grid_YX3)) == {0, 96, 200}, "halves keep their levels"


def test_a_file_says_how_it_was_made(tmp_path):
    settings = {"prompt": "drei Bären 🐻", "guidance": 1.5, "class": None}
    pixels_YX3 = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    save_png(pixels_YX3, tmp_path / "new/image.png", settings)
    assert read_settings(tmp_path / "new/image.png") == settings
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/image.png")), pixels_YX3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["image.png"]


def test_files_that_say_nothing(tmp_path):
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "plain.png")
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "list.png", ["no", "mapping"])
    assert read_settings(tmp_path / "plain.png") == read_settings(tmp_path / "list.png") == {}
    assert read_settings(tmp_path / "nowhere.png") is None


def test_a_torn_file_is_known_wherever_it_was_cut(tmp_path):
    path = tmp_path / "image.png"
    save_png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), path, {"a": 1})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 4, 7):  # but for the checksum of the empty last chunk
        path.write_bytes(whole[:length])
        assert read_settings(path) is None, length
        path.write_bytes(whole[:length] + bytes(len(whole) - length))
        assert read_settings(path) is None, f"zeros after {length}"
    path.write_bytes(whole)
    assert read_settings(path) == {"a": 1}

"""Images as files: what pixels show, how grids are laid out, what a file says of itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from madformer.data.image_files import MAX_GRID, MIN_SIDE, read_settings, save_png, to_grid, to_pixels, to_tiles


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

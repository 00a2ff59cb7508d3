"""Images of every kind become RGB by stated rules, or there is a reason why not."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import picture, png_header
from PIL import Image, ImageFile

from bpo.data import images
from bpo.params import Refusal


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(side=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 200, 0] + [0] * 762)
    return image


@pytest.mark.parametrize("image, options, wanted", [
    (palette(), {}, (0, 200, 0)), (palette(), {"transparency": 1}, (255, 255, 255)),
    *((Image.new(mode, (4, 4), colour), {}, wanted) for mode, colour, wanted in (
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("LA", (0, 0), (255, 255, 255)),
        ("L", 90, (90, 90, 90)), ("1", 1, (255, 255, 255)), ("LA", (90, 255), (90, 90, 90)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30))))])
def test_palettes_are_resolved_grey_becomes_rgb_and_what_is_transparent_lies_on_white(
        tmp_path, image, options, wanted):
    image.save(tmp_path / "x.png", **options)
    read = images.load(tmp_path / "x.png")
    assert (read.mode, read.getpixel((1, 1))) == ("RGB", wanted)
    assert images.load(str(tmp_path / "x.png")) == read  # as rows that trainers take name it


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    read = images.load(tmp_path / "c.jpg")
    red, green, blue = read.getpixel((4, 4))
    assert read.mode == "RGB" and red > 200 and green < 60 and blue < 60


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "g.png")
    read = np.asarray(images.load(tmp_path / "g.png"))
    assert read.shape == (16, 16, 3)
    assert abs(read.mean() - 127.5) < 3


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to look at it
    image.save(tmp_path / "e.png", exif=exif)
    read = images.load(tmp_path / "e.png")
    assert read.size == (4, 6)
    assert read.getpixel((3, 0)) == (255, 255, 255)


@pytest.mark.parametrize("name", ("e.png", "e.jpg", "e.webp"))
@pytest.mark.parametrize("orientation", (1, 3, 6, 8))
def test_the_size_is_read_from_the_header_alone(tmp_path, monkeypatch, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
    upright = images.load(tmp_path / name).size
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert images.size(tmp_path / name) == upright


def test_the_size_of_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "t.png").write_text("words")
    with pytest.raises(Refusal, match=r"t\.png: image format is not known"):
        images.size(tmp_path / "t.png")


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert images.load(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0)


# --- what cannot be used ------------------------------------------------------------------------


DAMAGED = {
    "empty.png": (b"", "image file is empty"),
    "text.png": (b"not a picture", "image format is not known"),
    "page.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image format is not known"),
    "cut.png": (encoded(noise(), "PNG")[:2000], "image is cut off or damaged"),
    "cut.jpg": (encoded(noise(), "JPEG")[:2000], "image is cut off or damaged"),
    "end.jpg": (encoded(noise(), "JPEG")[:-200], "image is cut off or damaged"),
    "bomb.png": (png_header(60_000, 60_000), "image is too large"),
    "warning.png": (png_header(10_000, 10_000), "image is too large"),
    "line.png": (encoded(Image.new("RGB", (900, 2)), "PNG"), "image is too narrow")}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_wrong_with_an_image_is_said(tmp_path, name):
    data, reason = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    assert list(images.problems([tmp_path / name])) == [reason]
    with pytest.raises(Refusal, match=f"{name}: {reason}"):
        images.load(tmp_path / name)


def test_a_missing_image_is_said_to_be_missing(tmp_path):
    for name in ("none.png", ".", "a\0b.png", "x" * 300, "none.parquet#0"):
        assert images.problem(tmp_path / name) == "image file is missing"


def test_problems_come_in_the_order_of_the_files(tmp_path):
    picture("disc", "red", 0).save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    files = [tmp_path / n for n in ("good.png", "empty.png", "empty.png", "none.png")] * 60
    wanted = [images.problem(f) for f in files]
    assert list(images.problems(iter(files))) == wanted
    assert len(set(wanted)) == 3


def test_few_images_are_opened_ahead(tmp_path):
    taken = []

    def files():
        for number in range(10_000):
            taken.append(number)
            yield tmp_path / f"{number}.png"

    assert next(images.problems(files())) == "image file is missing"
    assert len(taken) < 200


def test_one_image_of_many_rows_is_decoded_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(images, "problem", lambda file: opened.append(file))
    list(images.problems([tmp_path / n for n in "aaab"]))
    assert sorted(opened) == [tmp_path / "a", tmp_path / "b"]


# --- where images may lie -----------------------------------------------------------------------

def test_images_stay_in_their_folder(tmp_path):
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    picture("disc", "red", 0).save(tmp_path / "out.png")
    picture("disc", "red", 0).save(root / "a.png")
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "near.png").symlink_to(root / "a.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    assert images.place(root, "deep/../a.png") == root / "deep/../a.png"
    assert images.place(root, "near.png") == root / "near.png"
    for name in ("../out.png", str(root / "a.png"), "link.png", "deep/../../out.png",
                 "../x.parquet#1", "/x.parquet#1"):
        assert images.place(root, name) is None, name
    assert not images.exists(images.place(root, "loop.png"))


# --- images inside parquet ----------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "yellow")


def parquet(folder, column, kind, values, **options):
    table = pyarrow.table({"n": list(range(len(values))), column: pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, folder / "t.parquet", **options)
    return folder / "t.parquet"


STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.mark.parametrize("column, kind, shape", [
    ("image", STRUCT, lambda b: {"bytes": b, "path": None}), ("image", pyarrow.binary(), bytes),
    ("images", pyarrow.list_(STRUCT), lambda b: [{"bytes": b, "path": "x.png"}])])
def test_images_are_read_from_parquet_rows(tmp_path, column, kind, shape):
    pictures = [picture("disc", c, 0) for c in COLOURS]
    file = parquet(tmp_path, column, kind, [shape(encoded(p, "PNG")) for p in pictures],
                   row_group_size=3)
    for row in (3, 0, 2, 1):
        read = images.load(file.with_name(f"t.parquet#{row}"))
        assert read.tobytes() == pictures[row].tobytes()
    assert images.problem(file.with_name("t.parquet#4")) == "image file is missing"


def test_bad_images_in_parquet_are_told_as_in_files(tmp_path):
    file = parquet(tmp_path, "image", STRUCT, [
        {"bytes": None, "path": "x.png"}, {"bytes": b"", "path": None}, None,
        {"bytes": encoded(noise(), "JPEG")[:2000], "path": None}])
    assert [images.problem(file.with_name(f"t.parquet#{n}")) for n in range(4)] == [
        "image file is missing", "image file is empty", "image file is missing",
        "image is cut off or damaged"]


def test_a_parquet_file_written_anew_is_read_anew(tmp_path):
    for colour in ("red", "blue"):
        whole = picture("disc", colour, 0)
        file = parquet(tmp_path, "image", pyarrow.binary(), [encoded(whole, "PNG")])
        assert images.load(file.with_name("t.parquet#0")).tobytes() == whole.tobytes()

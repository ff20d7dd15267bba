"""Tests of the colorizer: CPU, no network, two minutes on two cores.

    python -m pytest
    MUTATIONS=10000 python -m pytest -k mutated      # the full count of broken pictures
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"  # threads of torch and of the processes started here: steady
import csv
import hashlib
import io
import json
import math
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from skimage.color import lab2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

import data
import models
import sample
import train

TINY = "--data demo --size 32 --width 4 --device cpu".split()
PRE = [*TINY, "--pretrain-epochs", "1", "--epochs", "0"]  # a second
HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and saves after every epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, as nohup and & have them,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)              # these would not be answered


@pytest.fixture
def refused(capsys):
    """Check that a command fails with one line, which names what is wrong, and writes nothing."""
    def check(main, command, *named, status=2):
        before = tree()
        capsys.readouterr()
        try:
            got = main(command)
        except SystemExit as error:
            got = error.code
        (line,) = capsys.readouterr().err.splitlines()
        assert got == status and all(name in line for name in named), (got, line)
        assert tree() == before
    return check


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A generator that has learned nothing, but colours strongly."""
    torch.manual_seed(0)
    generator = models.UNet(4)
    nn.init.normal_(generator.head.weight, 0, 1.0)
    path = tmp_path_factory.mktemp("ckpt") / "g.pt"
    torch.save({"generator": generator.state_dict()} | INFO, path)
    return str(path)


INFO = {"size": 32, "seed": 0, "epoch": 1, "options": {}, "test_means": [0.0]}  # in a g.pt


def photo(size=(40, 30), seed=0, mode="RGB"):
    """A smooth colourful picture, other for each seed."""
    noise = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def make_photos(folder, count=20):
    for i in range(count):
        path = Path(folder, "ab"[i % 2], f"{i:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed=i).save(path)
    return Path(folder)


def tree(folder="."):
    """Every file below folder, with its content's hash."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def same(a, b):
    """Equality, bit by bit, of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


def read_log(out="runs"):
    with open(Path(out, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


# --- Colour --------------------------------------------------------------------------------------

def cube(low, high, n):
    axes = [np.linspace(a, b, n) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes), -1).reshape(1, n * n, n, 3)


def to_torch(image):
    return torch.from_numpy(image).permute(0, 3, 1, 2).float()


def to_numpy(image):
    return image.permute(0, 2, 3, 1).numpy()


def test_rgb_to_lab_is_scikit_images():
    rgb = cube((0, 0, 0), (1, 1, 1), 41)
    lab = to_numpy(data.rgb_to_lab(to_torch(rgb)))
    assert np.abs(lab - rgb2lab(rgb)).max() < 1e-3  # float32, and scikit-image's step at 0.008856


@pytest.mark.filterwarnings("ignore:.*negative Z")
def test_lab_to_rgb_is_scikit_images_also_outside_the_gamut():
    lab = cube((0, -128, -128), (100, 127, 127), 41)
    rgb = to_numpy(data.lab_to_rgb(to_torch(lab)))
    assert np.abs(rgb - lab2rgb(lab)).max() < 1e-4  # float32
    assert rgb.min() == 0 and rgb.max() == 1


@pytest.mark.filterwarnings("ignore:.*negative Z")
def test_keep_lightness_changes_only_colours_outside_the_gamut():
    lab = cube((1, -100, -100), (99, 100, 100), 31)
    rgb = to_numpy(data.lab_to_rgb(to_torch(lab), keep_lightness=True))
    assert rgb.min() >= 0 and rgb.max() <= 1
    assert np.abs(rgb2lab(rgb)[..., 0] - lab[..., 0]).max() < 0.05  # float32
    inside = np.abs(rgb2lab(lab2rgb(lab)) - lab).max(-1) < 1e-3
    assert 3000 < inside.sum() < 9000 and np.abs(rgb - lab2rgb(lab))[inside].max() < 1e-4


def test_8_bit_colours_survive_the_round_trip():
    rgb = torch.cartesian_prod(*[torch.arange(0, 256, 5)] * 3).T.reshape(1, 3, -1, 1)
    back = data.lab_to_rgb(data.denormalize(*data.normalize(data.rgb_to_lab(rgb / 255))))
    assert torch.equal((back * 255).round().long(), rgb)


def test_networks_see_lab_scaled_to_one():
    L, ab = data.normalize(torch.tensor([0.0, 110, -110]).view(1, 3, 1, 1))
    assert L.item() == -1 and ab.flatten().tolist() == [1, -1]


@pytest.mark.parametrize("convert, values", [
    (data.rgb_to_lab, [0.0, 1.0]), (data.lab_to_rgb, [-500.0, 0.0, 100.0, 500.0])])
def test_colour_is_differentiable_also_at_the_extremes(convert, values):
    x = torch.cartesian_prod(*[torch.tensor(values)] * 3).T.reshape(1, 3, -1, 1).requires_grad_()
    y = convert(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    rgb = torch.rand(1, 3, 3, 3, dtype=torch.float64) * 0.9 + 0.05
    x = (rgb if convert is data.rgb_to_lab else data.rgb_to_lab(rgb)).requires_grad_()
    assert torch.autograd.gradcheck(convert, x)


# --- Reading pictures ----------------------------------------------------------------------------

GREY = photo((50, 37), mode="L")
COLOUR = photo((50, 37))
MASK = photo((50, 37), seed=5, mode="L")
DEEP = np.asarray(GREY).astype(int) * 257
RAMP = np.linspace(-3.0, 9.0, 50 * 37).reshape(37, 50)
RAMP_GREY = Image.fromarray(((RAMP + 3) * 255 / 12).round().astype(np.uint8))
LIGHT = np.asarray(GREY) / 255  # GREY, if its values were proportional to light
LINEAR = Image.fromarray((255 * np.where(
    LIGHT > 0.0031308, 1.055 * LIGHT ** (1 / 2.4) - 0.055, 12.92 * LIGHT)).round().astype(np.uint8))


def lightness(image):
    return rgb2lab(np.asarray(image.convert("RGB")))[..., 0]


def saved(image, format, patch=None, **options):
    """A picture's file as bytes; patch: (tag, value) of a little-endian TIFF to overwrite."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    blob = buffer.getvalue()
    if patch:
        start = blob.index(struct.pack("<HHI", patch[0], 3, 1)) + 8
        blob = blob[:start] + struct.pack("<H", patch[1]) + blob[start + 2 :]
    return blob


def pgm(depth):
    values = (np.asarray(GREY) / 255 * depth).round().astype(">u2")
    return b"P5 50 37 %d\n" % depth + values.tobytes()


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(COLOUR, "PNG", exif=exif)


def chunk(kind, content):
    info = PngImagePlugin.PngInfo()
    info.add(kind, content)
    return info


def icc(kind):
    """A profile whose values are proportional to light: of RGB, or of grey."""
    if kind == "RGB":
        blob = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        start = blob.index(b"para") + 12  # (a x + b) ** g above d
        blob[start : start + 20] = struct.pack(">5i", 65536, 65536, 0, 65536, 0)
        return bytes(blob)
    tone, white = b"curv" + bytes(8), b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    table = struct.pack(">I4s2I4s2I", 2, b"wtpt", 156, 20, b"kTRC", 176, 12)
    header = struct.pack(">I4sI4s4s4s", 188, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + white[8:] + bytes(48)
    return header + table + white + tone


def second_page_broken():
    blob = saved(GREY, "TIFF", save_all=True, append_images=[MASK])
    start = struct.unpack("<I", blob[4:8])[0]
    entries = struct.unpack("<H", blob[start : start + 2])[0]
    second = start + 2 + 12 * entries
    return blob[:second] + struct.pack("<I", len(blob) - 5) + blob[second + 4 :]


T = Image.Transpose
RGBA = Image.merge("RGBA", (*COLOUR.split(), MASK))
PALETTE = COLOUR.quantize(16)
KEYED = PALETTE.copy()
KEYED.info["transparency"] = 3
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURES = {  # name: its file, what its lightness is to be, its alpha
    "grey.png": (saved(GREY, "PNG"), GREY, None),
    "grey.jpg": (saved(GREY, "JPEG", quality=100), GREY, None),
    "grey.bmp": (saved(GREY, "BMP"), GREY, None),
    "grey.webp": (saved(GREY, "WEBP", lossless=True), GREY, None),
    "grey.tif": (saved(GREY, "TIFF", compression="tiff_lzw"), GREY, None),
    "16-bit.png": (saved(Image.fromarray(DEEP.astype("<u2")), "PNG"), GREY, None),
    "16-bit.tif": (saved(Image.fromarray(DEEP.astype("<u2")), "TIFF"), GREY, None),
    "16-bit-big.tif": (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), GREY, None),
    "16-bit.pgm": (pgm(65535), GREY, None),
    "12-bit.pgm": (pgm(4095), GREY, None),
    "32-bit.tif": (saved(Image.fromarray((RAMP * 1e8).astype(np.int32)), "TIFF"), RAMP_GREY, None),
    "float.tif": (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), RAMP_GREY, None),
    "infinite.tif": (saved(Image.fromarray(np.where(RAMP == 9, np.inf, RAMP).astype(np.float32)),
                           "TIFF"), RAMP_GREY, None),
    "bit.png": (saved(GREY.convert("1"), "PNG"), GREY.convert("1"), None),
    "grey-alpha.png": (saved(Image.merge("LA", (GREY, MASK)), "PNG"), GREY, MASK),
    "palette.png": (saved(PALETTE, "PNG"), PALETTE, None),
    "key.png": (saved(KEYED, "PNG"), PALETTE, KEYED.convert("RGBA").getchannel("A")),
    "rgb.png": (saved(COLOUR, "PNG"), COLOUR, None),
    "rgba.png": (saved(RGBA, "PNG"), COLOUR, MASK),
    "rgba.webp": (saved(RGBA, "WEBP", lossless=True, exact=True), COLOUR, MASK),
    "rgba.tif": (saved(RGBA, "TIFF"), COLOUR, MASK),
    "cmyk.tif": (saved(COLOUR.convert("CMYK"), "TIFF"), COLOUR, None),
    "cmyk.jpg": (saved(COLOUR.convert("CMYK"), "JPEG", quality=100), COLOUR, None),
    "lab.tif": (saved(ImageCms.profileToProfile(COLOUR, *map(ImageCms.createProfile, (
        "sRGB", "LAB")), outputMode="LAB"), "TIFF"), COLOUR, None),
    "page.gif": (saved(GREY, "GIF", save_all=True, append_images=[MASK]), GREY, None),
    "pages.tif": (saved(GREY, "TIFF", save_all=True, append_images=[MASK]), GREY, None),
    "broken-page.tif": (second_page_broken(), GREY, None),
    "views.mpo": (saved(GREY, "MPO", save_all=True, append_images=[MASK], quality=100), GREY, None),
    "map.ppm": (saved(COLOUR, "PPM"), COLOUR, None),
    "pixel.png": (saved(GREY.crop((0, 0, 1, 1)), "PNG"), GREY.crop((0, 0, 1, 1)), None),
    "line.png": (saved(GREY.resize((1, 300)), "PNG"), GREY.resize((1, 300)), None),
    "row.png": (saved(GREY.resize((900, 2)), "PNG"), GREY.resize((900, 2)), None),
    "grey-icc.png": (saved(GREY, "PNG", icc_profile=icc("GREY")), LINEAR, None),
    "icc.png": (saved(GREY.convert("RGB"), "PNG", icc_profile=icc("RGB")), LINEAR, None),
    "other-icc.png": (saved(GREY, "PNG", icc_profile=SRGB), GREY, None),
    "broken-icc.png": (saved(GREY, "PNG", icc_profile=b"broken"), GREY, None),
    "gamma.png": (saved(GREY, "PNG", pnginfo=chunk(b"gAMA", struct.pack(">I", 100000))), LINEAR,
                  None),
    "usual-gamma.png": (saved(GREY, "PNG", pnginfo=chunk(b"gAMA", struct.pack(">I", 45455))), GREY,
                        None),
    "broken-exif.png": (saved(GREY, "PNG", exif=b"Exif\0\0II*\0\xff\xff\0\0\xff"), GREY, None),
    "long-text.png": (saved(GREY, "PNG", pnginfo=chunk(
        b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20)))), GREY, None),
} | {f"turned-{number}.png": (oriented(number), COLOUR if turn is None else COLOUR.transpose(turn),
                              None)
     for number, turn in enumerate([None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM,
                                    T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90], 1)}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_keeps_its_lightness_and_alpha(name, ckpt):
    blob, expected, alpha = PICTURES[name]
    Path(name).write_bytes(blob)
    assert sample.main(["--ckpt", ckpt, name, "out", "--grid", "0"]) == 0
    (path,) = Path("out").iterdir()
    assert path.name == (name if Path(name).suffix in sample.SAVE else f"{name}.png")
    with Image.open(path) as result:
        result.load()
    assert result.size == expected.size and not result.getexif().get(0x0112)
    # 8 bits: a rounded RGB is at most half a level off in each channel, 0.6 of L* near black; JPEG
    # loses more, colour management works in tables of 8 bits, PNG's gamma is not sRGB's curve.
    loss = {"jpg": 3, "mpo": 3, "icc": 2.5, "lab": 2.5, "gamma": 4}
    limit = max([0.7, *(loss[word] for word in loss if word in name)])
    assert np.abs(lightness(result) - lightness(expected)).max() < limit
    if name not in ("pixel.png", "bit.png"):  # black and white have no colour
        assert np.ptp(np.asarray(result.convert("RGB")).astype(int), axis=2).max() > 8
    if alpha is None:
        assert not result.has_transparency_data
    else:
        assert np.array_equal(result.convert("RGBA").getchannel("A"), alpha)
    # Training reads it likewise.
    small = expected.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    seen = Image.fromarray(data.decode(Path(name), 16))
    assert np.abs(lightness(seen) - lightness(small)).max() < limit + 3  # rounded before resizing


@pytest.mark.parametrize("blob", [
    saved(Image.fromarray(DEEP.astype("<u2")), "TIFF", (258, 12)),  # 12 bits
    saved(Image.fromarray(DEEP.astype("<u2")), "TIFF", (262, 0)),  # white is 0
    saved(Image.fromarray((RAMP * 1e8).astype(np.int32)), "TIFF", (339, 1)),  # unsigned
    saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),  # of what range?
    saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    saved(Image.fromarray(DEEP.astype("<u2")), "PNG", transparency=int(DEEP[0, 0])),  # a colour key
    saved(GREY, "PNG")[:-300], b"", b"no picture",
], ids="12-bit white-is-0 unsigned constant nan key cut empty text".split())
def test_a_picture_that_cannot_be_read_right_is_refused_by_name(blob, ckpt, refused):
    Path("a.tif").write_bytes(blob)
    refused(sample.main, ["--ckpt", ckpt, "a.tif", "out"], "a.tif: not colorized: ", status=1)
    assert not data.decode(Path("a.tif"), 16).any()


def test_alpha_that_the_format_cannot_keep_is_refused_by_name(ckpt, refused):
    for name in ("a.jpg", "a.bmp"):
        RGBA.save(name, "PNG")
        refused(sample.main, ["--ckpt", ckpt, name, "out"], name, "has alpha", status=1)


def test_one_limit_of_pixels_holds_everywhere(monkeypatch, ckpt):
    photo((40, 30)).save("a.png")
    for limit, readable in ((1199, False), (1200, True)):
        monkeypatch.setattr(data, "MAX_PIXELS", limit)
        assert sample.main(["--ckpt", ckpt, "a.png", "out"]) == (0 if readable else 1)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
        assert data.decode(Path("a.png"), 16).any() == readable


def test_metadata_survives_where_the_format_has_a_place(ckpt):
    exif, when = Image.Exif(), "1921:05:04 03:02:01"
    exif[270], exif[306], exif[0x0112], exif[259] = "Aunt Vera's roses", when, 6, 7
    exif[0x8769] = {0x9003: when}
    exif = exif.tobytes()
    for suffix, options in {"jpg": {"comment": b"scanned"}, "png": {"pnginfo": chunk(
            b"tEXt", b"Author\0Anna")}, "tif": {}, "webp": {}}.items():
        COLOUR.save(f"a.{suffix}", exif=exif, dpi=(300, 300), **options)
        assert sample.main(["--ckpt", ckpt, f"a.{suffix}", "out"]) == 0
        with Image.open(f"out/a.{suffix}") as image:
            image.load()
        found = image.getexif()
        assert (found[270], found[306]) == ("Aunt Vera's roses", when) and 0x0112 not in found
        assert found.get_ifd(0x8769)[0x9003] == when
        assert found.get(259) != 7  # how the file was compressed, not the picture
        if suffix != "webp":
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert image.size == (37, 50)
    assert Image.open("out/a.jpg").info["comment"] == b"scanned"
    assert Image.open("out/a.png").text == {"Author": "Anna"}


def test_metadata_that_does_not_fit_costs_no_picture(ckpt):
    exif = Image.Exif()
    exif[270] = "x" * 70_000  # a JPEG has room for 65,533 bytes
    saved_as_png = saved(COLOUR, "PNG", exif=exif)
    Path("a.jpg").write_bytes(saved_as_png)
    Path("a.bmp").write_bytes(saved(COLOUR, "TIFF", dpi=(4e9, 4e9)))  # a BMP's are 32 bits
    for name in ("a.jpg", "a.bmp"):
        assert sample.main(["--ckpt", ckpt, name, "out"]) == 0 and Path("out", name).exists()


# --- Data ----------------------------------------------------------------------------------------

def test_split_is_70_15_15_and_depends_on_the_seed_alone():
    a = data.Photos(make_photos("here", 40), 32, seed=1)
    b = data.Photos(make_photos("there/deeper", 40), 32, seed=1)
    parts = [a.train.tolist(), a.val.tolist(), a.test.tolist()]
    assert [len(p) for p in parts] == [28, 6, 6] and sorted(sum(parts, [])) == list(range(40))
    assert parts == [b.train.tolist(), b.val.tolist(), b.test.tolist()]
    assert (a.test_means, a.contents) == (b.test_means, b.contents)
    means = [a.images[row].float().mean().item() for row in a.test]
    assert a.test_means == pytest.approx(means, abs=0.06)  # one decimal
    c = data.Photos("here", 32, seed=2)
    assert c.test_means != a.test_means and c.contents == a.contents


def test_identical_images_fall_into_the_same_part():
    make_photos("photos", 30)
    for i in range(20):  # by chance alone, 20 pairs would all stay together once in 10^6 runs
        original = Path(f"photos/{'ab'[i % 2]}/{i:02}.png")
        Path(f"photos/copy-{i:02}.png").write_bytes(original.read_bytes())
    photos = data.Photos("photos", 32, seed=0)
    names = [p.as_posix() for p in data.find_images("photos")[0]]
    part = {names[row]: i for i, rows in enumerate((photos.train, photos.val, photos.test))
            for row in rows.tolist()}
    assert len(part) == 50
    assert all(part[f"copy-{i:02}.png"] == part[f"{'ab'[i % 2]}/{i:02}.png"] for i in range(20))


def test_the_cache_serves_until_a_file_changes(monkeypatch):
    folder, decoded, decode = make_photos("photos"), [], data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(args) or decode(*args))

    def decodes(expected):
        """Decode, and count; returns the digest of the pixels."""
        decoded.clear()
        contents = data.Photos(folder, 32, 0).contents
        assert len(decoded) == expected
        return contents

    first = decodes(20)
    assert decodes(0) == first
    photo(seed=99).save(folder / "a" / "00.png")  # changed
    assert decodes(20) != first
    photo(seed=98).save(folder / "new.bmp")  # added; not compressed, so that sizes are equal
    second, stat, path = decodes(21), os.stat(folder / "new.bmp"), folder / "new.bmp"
    photo(seed=97).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same name, size and time
    assert decodes(21) != second
    big = photo((200, 200))
    big.save(path)
    third = decodes(21)
    big.putpixel((100, 60), (1, 2, 3))  # far from the blocks that are looked at: the time tells
    time.sleep(0.02)
    big.save(path)
    assert decodes(21) != third
    path.unlink()  # deleted
    assert decodes(0) and len(tree("cache")) == 6  # as before; one whole file each, no remains


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"text"])
def test_a_damaged_cache_is_made_anew(damage):
    folder = make_photos("photos")
    contents = data.Photos(folder, 32, 0).contents
    (cached,) = Path("cache").iterdir()
    whole = cached.read_bytes()
    assert len(whole) == 20 * 48 * 48 * 3  # half as large again as training needs
    cached.write_bytes(damage(whole))
    assert data.Photos(folder, 32, 0).contents == contents and cached.read_bytes() == whole


def test_images_are_memory_mapped_and_never_written():
    images = data.Photos(make_photos("photos"), 32, 0).images
    before = tree("cache")
    images[:] = 0
    assert tree("cache") == before


def deep_folder(top):
    """A picture below a path longer than the system takes."""
    here = os.getcwd()
    os.chdir(top)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("a.png").write_bytes(saved(photo(), "PNG"))
    os.chdir(here)


def test_what_cannot_be_read_is_named_and_left_out(capsys, monkeypatch):
    folder = make_photos("photos")
    (folder / "cut.png").write_bytes((folder / "a" / "00.png").read_bytes()[:100])
    (folder / "text.jpg").write_text("no picture")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / ".hidden.png").write_text("macOS leaves such")
    os.mkfifo(folder / "pipe.png")
    deep_folder(folder)
    for _ in range(2):  # also when the cache is there
        photos = data.Photos(folder, 32, 0)
        assert sum(map(len, (photos.train, photos.val, photos.test))) == 20
        out = capsys.readouterr().out
        assert "2 of 22 images left out, broken or all black: cut.png, text.jpg" in out
        assert "2 files or folders cannot be read" in out and "gone.png (No such" in out
        assert "(File name too long)" in out
    # A passing error while decoding is not kept as a black picture.
    read, read_bytes = [], Path.read_bytes
    def failing(path):
        read.append(path)
        if path.name == "00.png":
            raise OSError(5, "Input/output error")
        time.sleep(0.05)
        return read_bytes(path)
    (folder / "text.jpg").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(data.UsageError, match="photos/a/00.png: Input/output error"):
            data.Photos(folder, 32, 0)
        assert len(read) < 15  # of 21: the others are not waited for
    assert len(data.Photos(folder, 32, 0).images) == 21


def test_black_and_white_photographs_are_a_warning(capsys):
    make_photos("photos", 20)
    data.Photos("photos", 32, 0)
    assert "warning" not in capsys.readouterr().out
    for i in range(3):
        photo(seed=50 + i, mode="L").save(f"photos/{i}.png")
    data.Photos("photos", 32, 0)
    assert "warning: 3 of 23 images are black and white" in capsys.readouterr().out


@pytest.mark.parametrize("count, message", [
    (0, "0 readable images"), (9, "9 readable images"), (-12, "too many identical images")])
def test_too_few_images_are_refused(count, message):
    Path("photos").mkdir()
    make_photos("photos", count)
    for i in range(-count):
        photo().save(f"photos/{i}.png")
    with pytest.raises(data.UsageError, match=f"--data photos: {message}"):
        data.Photos("photos", 32, 0)


def test_a_full_disk_is_one_line_and_leaves_nothing(refused):
    make_photos("photos")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:  # a limit of a file's size fails like a full disk, in the cache and in g.pt
        refused(train.main, ["--data", "photos", "--out", "runs"], "cannot write cache/", status=1)
        with pytest.raises(OSError, match="cannot write runs/g.pt.*is there room"):
            run = tiny_run("--width", "8")
            run.log = [{"epoch": 1}]
            run.save(data.Photos("demo", 32, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not any(".part" in path for path in tree())


def test_a_write_replaces_what_a_killed_one_left():
    for _ in range(2):
        try:
            with data.replacing(Path("out/a.txt")) as part:
                part.write_text("half")
                os.link(part, "out/left")
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            os.rename("out/left", part)  # as after a kill
    assert len(tree("out")) == 1
    with data.replacing(Path("out/a.txt")) as part:
        part.write_text("whole")
    assert [p.name for p in Path("out").iterdir()] == ["a.txt"]


def test_only_the_default_folder_is_downloaded(monkeypatch, refused):
    import torchvision.datasets
    def broken(self, root, download):
        make_photos(root / "flowers-102" / "jpg", 3)
        raise RuntimeError("no route to host")
    def whole(self, root, download):
        make_photos(root / "flowers-102" / "jpg")
    monkeypatch.setattr(torchvision.datasets.Flowers102, "__init__", broken)
    refused(train.main, ["--data", "brids"], "--data brids: no folder")
    with pytest.raises(data.UsageError, match="by hand.*--data demo"):
        data.Photos("data", 32, 0)
    assert not Path("data").exists() and Path("data.part").exists()
    monkeypatch.setattr(torchvision.datasets.Flowers102, "__init__", whole)
    assert len(data.Photos("data", 32, 0).images) == 20 and not Path("data.part").exists()


def test_each_image_gets_its_own_crop_mirrored_or_not():
    torch.manual_seed(0)
    ramp = (torch.arange(96) + 0.5) / 96  # a picture of its own coordinates
    x, y = ramp.expand(96, 96), ramp[:, None].expand(96, 96)
    crops = data.random_crops(torch.stack([x, y, x * 0]).expand(4000, -1, -1, -1), 64)
    assert crops.shape == (4000, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 1
    first, last = crops[:, :2, 0, 0], crops[:, :2, -1, -1]  # centres of the corner pixels
    width, height = ((last - first) * 64 / 63).T
    assert 0.45 < (width < 0).float().mean() < 0.55 and not (height < 0).any()  # 6 deviations
    width, tolerance = width.abs(), 1e-4
    for side in (width, height):  # never enlarged: 64 pixels of at least two thirds of 96
        assert 2 / 3 - tolerance < side.min() < 0.68 and 0.99 < side.max() < 1 + tolerance
    ratio, area = width / height, width * height
    assert 0.9 - tolerance < ratio.min() < 0.91 and 1.09 < ratio.max() < 1.1 + tolerance
    assert area.mean() == pytest.approx((4 / 9 + 1) / 2, abs=0.02)  # uniform between the squares
    left = torch.minimum(first, last) - torch.stack([width, height], 1) / 128
    for start, side in ((left[:, 0], width), (left[:, 1], height)):
        place = (start / (1 - side))[side < 0.9]
        assert place.mean() == pytest.approx(0.5, abs=0.03)  # anywhere inside
        assert place.std() == pytest.approx(12 ** -0.5, abs=0.02)  # uniform
        assert start.min() > -tolerance and (start + side).max() < 1 + tolerance


def test_batches_are_the_whole_image_or_crops_of_it():
    photos = data.Photos(make_photos("photos"), 32, 0)
    L, ab = photos.batch(photos.val)
    assert L.shape == (3, 1, 32, 32) and ab.shape == (3, 2, 32, 32)
    images = [Image.fromarray(photos.images[row].numpy()) for row in photos.val]
    lab = rgb2lab(np.stack([i.resize((32, 32), Image.Resampling.BICUBIC) for i in images]))
    assert np.abs((L[:, 0].numpy() + 1) * 50 - lab[..., 0]).max() < 0.7  # Pillow rounds to 8 bits
    assert np.abs(to_numpy(ab) * 110 - lab[..., 1:]).mean() < 0.5
    torch.manual_seed(0)
    crops = photos.batch(photos.val[[0, 0]], crop=True)
    assert not torch.equal(crops[0][0], crops[0][1]) and crops[1].shape == (2, 2, 32, 32)
    assert L.abs().max() <= 1 and ab.abs().max() <= 1


# --- Networks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("side", [128, 256])
def test_shapes(side):
    L, ab = torch.rand(2, 1, side, side) * 2 - 1, torch.rand(2, 2, side, side)
    fake = models.UNet(4)(L)
    assert fake.shape == ab.shape and fake.abs().max() <= 1
    patches = side // 8 - 3
    assert models.PatchCritic(4)(torch.cat([L, ab], 1)).shape == (2, 1, patches, patches)


def test_parameter_counts():
    # Convolutions of Ronneberger's figure 1 with two outputs, and two numbers a batch-norm channel.
    assert sum(p.numel() for p in models.UNet().parameters()) == 31_036_546
    w = [3, 64, 128, 256, 512, 512, 1]
    weights = sum(16 * a * b for a, b in zip(w, w[1:]))
    assert sum(p.numel() for p in models.PatchCritic().parameters()) == weights + 64 + 1


@pytest.mark.parametrize("shape", [(100, 128), (128, 100)])
def test_generator_refuses_sides_that_16_does_not_divide(shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        models.UNet(4)(torch.zeros(1, 1, *shape))


def test_up_joins_the_skip_connection():
    up = models.Up(4, 2)
    up.conv = nn.Identity()
    x, skip = torch.rand(1, 4, 3, 3), torch.rand(1, 2, 6, 6)
    assert torch.equal(up(x, skip), torch.cat([skip, up.up(x)], 1))


def test_unet_uses_every_resolution():
    """Cutting a skip connection, or the bottleneck, changes the output."""
    network, L = models.UNet(2).eval(), torch.rand(1, 1, 32, 32)
    whole = network(L)
    for name in ("down1", "down2", "down3", "down4", "bottleneck"):
        hook = getattr(network, name).register_forward_hook(lambda m, i, out: out * 0)
        assert not torch.equal(network(L), whole), name
        hook.remove()


def test_critic_initialisation_and_norms():
    layers = models.PatchCritic(64).layers
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    for c in convolutions:
        assert abs(c.weight.std() - 0.02) < 0.002 and abs(c.weight.mean()) < 0.002  # > 3000 weights
        assert c.bias is None or not c.bias.any()
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1, 1]
    assert [type(m).__name__ for m in layers[:5]] == [
        "Conv2d", "LeakyReLU", "Conv2d", "InstanceNorm2d", "LeakyReLU"]
    assert sum(isinstance(m, nn.InstanceNorm2d) for m in layers) == 4
    assert {m.negative_slope for m in layers if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_critic_judges_each_image_alone():
    torch.manual_seed(0)
    critic, lab = models.PatchCritic(4), torch.rand(3, 3, 32, 32)
    assert critic(lab).shape == (3, 1, 1, 1)
    assert torch.allclose(critic(lab)[:1], critic(lab[:1]), atol=1e-6)  # other order of summation


# --- Losses --------------------------------------------------------------------------------------

class LinearCritic(nn.Module):
    """score = sum(weight * lab): its gradient is the weight, whatever the picture."""

    def __init__(self, norm):
        super().__init__()
        weight = torch.randn(1, 3, 8, 8)
        self.weight = nn.Parameter(weight * norm / torch.linalg.vector_norm(weight[:, 1:]))

    def forward(self, lab):
        return (lab * self.weight).sum((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("norm", [0.5, 1.0, 3.0])
def test_penalty_of_a_linear_critic(norm):
    critic, L, real, fake = LinearCritic(norm), torch.rand(4, 1, 8, 8), *torch.rand(2, 4, 2, 8, 8)
    penalty = train.gradient_penalty(critic, L, real, fake)
    assert penalty.item() == pytest.approx((norm - 1) ** 2, abs=1e-5)  # the norm over ab alone
    penalty.backward()
    slope = 2 * (norm - 1) * critic.weight[:, 1:] / norm  # second order: d penalty / d weight
    assert torch.allclose(critic.weight.grad[:, 1:], slope, atol=1e-4)
    assert not critic.weight.grad[:, :1].any()


def test_penalty_of_a_flat_critic_has_a_finite_gradient():
    critic = LinearCritic(1.0)
    nn.init.zeros_(critic.weight)
    penalty = train.gradient_penalty(critic, torch.rand(2, 1, 8, 8), *torch.rand(2, 2, 2, 8, 8))
    penalty.backward()
    assert penalty.item() == 1 and critic.weight.grad.isfinite().all()


def test_penalty_is_taken_between_real_and_fake_in_float32():
    seen, kernel = [], torch.ones(1, 3, 1, 1)
    def critic(lab):
        scores = nn.functional.conv2d(lab, kernel)
        seen.append((lab, scores.dtype))
        return scores
    L, real, fake = torch.rand(50, 1, 8, 8), torch.ones(50, 2, 8, 8), torch.zeros(50, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        train.gradient_penalty(critic, L, real, fake.bfloat16())
    ((lab, dtype),) = seen
    mix = lab[:, 1:].flatten(1)
    assert torch.equal(lab[:, :1], L) and (mix.amax(1) - mix.amin(1)).max() == 0  # one an image
    assert mix.min() >= 0 and mix.max() <= 1 and mix[:, 0].std() > 0.2  # uniform: 0.29
    assert dtype == torch.float32


def test_losses_have_the_papers_signs():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
    assert train.critic_loss(real, fake) == 1.5 - 4  # falls as real scores above colorized
    assert train.generator_loss(torch.tensor(0.1), fake, 100.0) == pytest.approx(100 * 0.1 - 1.5)
    L, ab = torch.ones(2, 1, 4, 4), torch.ones(2, 2, 4, 4)
    scores = train.score(lambda lab: lab.mean(1, keepdim=True), L, ab)
    assert torch.equal(scores, torch.ones(2))


# --- Training ------------------------------------------------------------------------------------

def tiny_run(*options):
    args = train.parse_args([*TINY, "--amp", "off", *options])
    args.processes = 1
    return train.Run(args, CPU)


BATCH = torch.rand(4, 1, 32, 32) * 2 - 1, torch.rand(4, 2, 32, 32) * 2 - 1


def test_a_batch_is_one_critic_step_and_two_generator_steps(monkeypatch):
    run, steps, forwards, step = tiny_run(), [], [], train.step
    def spy(network, optimizer, loss, scaler):
        other = run.generator if network is run.critic else run.critic
        before = [p.clone() for p in other.parameters()]
        own = [p.clone() for p in network.parameters()]
        step(network, optimizer, loss, scaler)
        assert all(map(torch.equal, before, other.parameters()))  # each step trains its own network
        still = sum(map(torch.equal, own, network.parameters()))
        assert still == (network is run.critic)  # its last bias: the same for real and colorized
        if not steps:  # the critic's step does not reach the generator
            assert all(p.grad is None for p in run.generator.parameters())
        steps.append((type(network).__name__, loss.item()))
    monkeypatch.setattr(train, "step", spy)
    run.generator.register_forward_hook(lambda *_: forwards.append(1))
    terms = train.adversarial_step(run, *BATCH)
    assert [name for name, _ in steps] == ["PatchCritic", "UNet", "UNet"] and len(forwards) == 2
    assert steps[0][1] == pytest.approx((-terms["wasserstein"] + 10 * terms["penalty"]).item())
    assert steps[2][1] == pytest.approx((300 * terms["l1"] + terms["adversarial"]).item())
    run.args.critic_steps, run.args.generator_steps, run.args.lambda_gp = 3, 1, 0
    steps.clear()
    run.generator.zero_grad()
    terms = train.adversarial_step(run, *BATCH)
    assert [name for name, _ in steps] == ["PatchCritic"] * 3 + ["UNet"]
    assert steps[2][1] == pytest.approx(-terms["wasserstein"].item())


def test_logged_terms_are_what_they_are_called():
    run = tiny_run()
    for optimizer in (run.optimizer_g, run.optimizer_c):
        optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        fake = run.generator(BATCH[0])  # in training mode, as in the step
        gap = (train.score(run.critic, *BATCH) - train.score(run.critic, BATCH[0], fake)).mean()
        score = train.score(run.critic, BATCH[0], fake).mean()
    l1 = (fake - BATCH[1]).abs().mean().item()
    terms = {name: value.item() for name, value in train.adversarial_step(run, *BATCH).items()}
    assert terms["wasserstein"] == pytest.approx(gap.item(), rel=1e-3) and gap != 0
    assert terms["adversarial"] == pytest.approx(-score.item(), rel=1e-3)
    assert terms["l1"] == pytest.approx(l1, rel=1e-4)
    assert train.pretrain_step(run, *BATCH)["l1"].item() == pytest.approx(l1, rel=1e-4)


def test_adam_is_the_papers_in_both_networks():
    run = tiny_run()
    for optimizer, network in ((run.optimizer_g, run.generator), (run.optimizer_c, run.critic)):
        (group,) = optimizer.param_groups
        assert group["betas"] == (0.5, 0.9) and len(group["params"]) == len([*network.parameters()])


def test_a_scaled_loss_leaves_the_true_gradient():
    network, x = nn.Linear(3, 1), torch.rand(4, 3)
    optimizer, scaler = torch.optim.SGD(network.parameters(), lr=0.0), torch.amp.GradScaler("cpu")
    train.step(network, optimizer, network(x).sum(), scaler)
    assert torch.allclose(network.weight.grad, x.sum(0))


def test_ema_warms_up_and_averages_batch_norm_too():
    source, ema = models.UNet(2), models.UNet(2)
    for network, value in ((source, 1.0), (ema, 0.0)):
        for tensor in network.state_dict().values():
            tensor.fill_(value)
    train.update_ema(ema, source, updates=0, decay=0.999)  # decay 1 / 10
    assert {round(t.item(), 6) for n, t in ema.state_dict().items() for t in t.flatten()[:1]
            if "tracked" not in n} == {0.9}
    train.update_ema(ema, source, updates=10**6, decay=0.999)
    assert ema.down1[1].running_mean[0].item() == pytest.approx(0.9001)


def test_learning_rate():
    args = train.parse_args(["--pretrain-epochs", "10", "--pretrain-lr", "0.5", "--lr", "0.1"])
    rates = [train.learning_rate(args, epoch) for epoch in (0, 0.5, 1, 5.5, 9.9999, 10, 50)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.25, 0, 0.1, 0.1], abs=1e-6)


def test_an_epoch_is_every_image_once_in_another_order_cropped(monkeypatch):
    batches, rates, batch, step = [], [], data.Photos.batch, train.step
    def spy(photos, rows, crop=False):
        if crop:
            batches.append(rows.tolist())
        return batch(photos, rows, crop)
    def rate(network, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        step(network, optimizer, *rest)
    monkeypatch.setattr(data.Photos, "batch", spy)
    monkeypatch.setattr(train, "step", rate)
    command = [*TINY, "--pretrain-epochs", "1", "--epochs", "1", "--batch-size", "30"]
    assert train.main(command) == 0
    rows = set(data.Photos("demo", 32, 0).train.tolist())
    first, second = sum(batches[:10], []), sum(batches[10:], [])
    assert set(first) == set(second) == rows and len(first) == len(second) == 300  # once each
    assert first != second and first[:30] != sorted(first[:30])
    expected = [train.learning_rate(train.parse_args(command), (i + 0.5) / 10) for i in range(10)]
    assert rates == expected + [1e-4] * 30 and min(rates) > 0  # no step is lost at a rate of 0


def test_each_part_serves_its_purpose_and_the_average_is_what_counts(monkeypatch):
    evaluated, evaluate, pictures = [], train.evaluate, []
    def spy(predict, photos, rows, **options):
        evaluated.append((predict, rows.tolist()))
        return evaluate(predict, photos, rows, **options)
    monkeypatch.setattr(train, "evaluate", spy)
    monkeypatch.setattr(train, "save_picture", lambda *args: pictures.append(args))
    assert train.main(PRE) == 0
    photos, last = data.Photos("demo", 32, 0), load("runs/last.pt")
    assert evaluated[0][1] == photos.val.tolist()
    assert all(rows == photos.test.tolist() for _, rows in evaluated[1:]) and len(evaluated) == 5
    drawn = [rows.tolist() for _, _, rows, _ in pictures]
    assert drawn == [photos.val[:8].tolist(), photos.test[:8].tolist()]
    assert [str(path) for *_, path in pictures] == ["runs/epoch-0001.png", "runs/test.png"]
    psnr = {}
    for name in ("ema", "generator"):
        network = models.UNet(4).eval()
        network.load_state_dict(last[name])
        with torch.no_grad():
            figures = evaluate(lambda L, ab: network(L), photos, photos.val)
        psnr[name] = figures["psnr"].mean().item()
    assert float(read_log()[0]["val_psnr"]) == pytest.approx(psnr["ema"], abs=1e-4)
    assert abs(psnr["ema"] - psnr["generator"]) > 0.01
    half = {k: v.half() if v.ndim > 1 else v for k, v in last["ema"].items()}
    assert same(load("runs/g.pt")["generator"], half)


def test_evaluation_is_scikit_images():
    photos = data.Photos("demo", 32, 0)
    predict = lambda L, ab: (ab * 0.5).flip(1)
    figures = train.evaluate(predict, photos, photos.val, ssim=True)
    L, ab = photos.batch(photos.val)
    pairs = zip(*[to_numpy(train.to_uint8(L, x)) for x in (ab, predict(L, ab))])
    expected = [peak_signal_noise_ratio(*pair) for pair in pairs]
    assert figures["psnr"].numpy() == pytest.approx(expected, abs=1e-3)
    identical = train.evaluate(lambda L, ab: ab, photos, photos.val, ssim=True)
    assert identical["psnr"].tolist() == [100] * 64 and identical["ssim"].tolist() == [1] * 64
    assert figures["ssim"].max() < 1 and len(figures["ssim"]) == 64


def test_colourfulness_of_two_colours():
    # Half (255, 0, 0), half (0, 0, 255): rg = 255, 0; yb = 127.5, -255. By hand, deviations of
    # n - 1: 180.67 and 270.99 for two pixels; means 127.5 and -63.75.
    image = torch.tensor([[255, 0], [0, 0], [0, 255]], dtype=torch.uint8).view(1, 3, 1, 2)
    rg, yb = 255 / 2**0.5, 382.5 / 2**0.5
    expected = math.hypot(rg, yb) + 0.3 * math.hypot(127.5, 63.75)
    assert train.colourfulness(image).item() == pytest.approx(expected)
    assert train.colourfulness(torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)).item() == 0


def test_memory_of_evaluation_does_not_grow_with_the_size():
    sizes = {}
    for size in (32, 128, 1024):
        photos = type("Photos", (), {"size": size})
        sizes[size] = len(train.chunks(photos, torch.arange(5000))[0])
    assert sizes == {32: 1024, 128: 64, 1024: 1}


def test_training_end_to_end(capsys):
    command = "--data demo --size 32 --width 8 --batch-size 10".split()
    command += ["--pretrain-epochs", "8", "--epochs", "2"]
    assert train.main([*command, "--sample-every", "5"]) == 0
    rows, table = read_log(), capsys.readouterr().out.splitlines()[-7:]
    assert float(rows[7]["l1"]) < 0.8 * float(rows[0]["l1"])
    grey, mean, generator, real = [line[34:].replace("%", "").split() for line in table[2:6]]
    pretrained = max(float(row["val_psnr"]) for row in rows)
    assert pretrained > float(grey[0]) + 1  # validation against test: both of overlapping crops
    assert float(generator[2]) > 10 and real[:2] == ["100.00", "1.000"] and "demo" in table[6]
    assert grey[3] == real[3] == "0" and 0 < int(generator[3]) < 60  # worse than no colour
    assert "lambda_l1 300.0" in table[0] and Path("runs/test.txt").read_text().splitlines() == table
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "epoch-0005.png", "epoch-0010.png", "g.pt", "last.pt", "log.csv", "test.png", "test.txt"]
    for name in ("epoch-0010.png", "test.png"):
        with Image.open(f"runs/{name}") as picture:
            assert picture.size == (8 * 34 + 2, 3 * 34 + 2)
            grey, fake = (np.asarray(picture)[y : y + 32, 2:34].astype(int) for y in (2, 36))
        assert np.ptp(grey, axis=2).max() <= 1 < np.ptp(fake, axis=2).max()
    assert [row["phase"] for row in rows] == ["pretrain"] * 8 + ["wgan-gp"] * 2
    assert train.main(["--eval", "runs/g.pt", "--data", "demo", "--out", "again"]) == 0
    assert capsys.readouterr().out.splitlines() == table  # the same file, the same figures
    assert Path("again/test.txt").read_text() == Path("runs/test.txt").read_text()
    assert sample.main(["--ckpt", "runs/g.pt", str(HERE / "in"), "out"]) == 0


def test_eval_warns_of_other_images_of_the_same_names(capsys):
    command = ["--data", str(make_photos("photos")), "--batch-size", "4", *PRE[2:]]
    assert train.main(command) == 0
    for path in data.find_images("photos")[0]:  # as another decoder would see them
        with Image.open("photos" / path) as image:
            image.save("photos" / path, "JPEG", quality=90)
    for warned in (False, True):
        capsys.readouterr()
        assert train.main(["--eval", "runs/g.pt", "--data", "photos"]) == 0
        assert ("warning: these are not the images" in capsys.readouterr().out) == warned
        for i, path in enumerate(data.find_images("photos")[0]):
            photo(seed=100 + i).save("photos" / path)
    train.main(["--eval", "runs/g.pt", "--data", "demo"])
    out = capsys.readouterr().out
    assert "warning" in out and "demo: the parts overlap" not in out  # it was not trained on them


@pytest.mark.parametrize("where", ["term", "weight", "rate"])
def test_divergence_is_said_and_nothing_is_saved(where, refused, monkeypatch):
    command = [*TINY, "--pretrain-epochs", "1", "--resume"]
    assert train.main([*command, "--epochs", "0"]) == 0
    step = train.adversarial_step
    def diverging(run, L, ab):
        terms = step(run, L, ab)
        if where == "weight":
            run.critic.layers[0].bias.data[0] = math.nan
        return terms | ({"penalty": terms["penalty"] * math.nan} if where == "term" else {})
    monkeypatch.setattr(train, "adversarial_step", diverging)
    Path("runs/test.txt").unlink()
    if where == "rate":
        command = [*TINY, "--out", "other", "--pretrain-epochs", "0", "--lr", "1e9"]
        assert train.main([*command, "--epochs", "1"]) == 1 and not Path("other/last.pt").exists()
    else:
        refused(train.main, [*command, "--epochs", "1"], "epoch 2 diverged", "lower --lr", status=1)


def test_time_left_counts_both_phases(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(train, "live", lambda text: None)
    command = "--pretrain-epochs 2 --epochs 2 --batch-size 300".split()
    assert train.main([*TINY, *command]) == 0
    left = [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()
            if line.startswith("epoch")]
    # ten seconds between two looks at the clock: an epoch of one step takes 30
    assert left == ["4 min left", "3 min left", "0 min left", "0 min left"]


# --- Checkpoints ---------------------------------------------------------------------------------

LONG = [*TINY, "--pretrain-epochs", "2", "--epochs", "2", "--out"]
STATES = ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler")


def assert_same_run(a, b):
    last = [load(f"{out}/last.pt") for out in (a, b)]
    timed = {"images_per_s", "seconds"}
    logs = [[{k: row[k] for k in row.keys() - timed} for row in read_log(out)] for out in (a, b)]
    assert logs[0] == logs[1]
    for name in STATES:
        assert same(last[0][name], last[1][name]), name
    assert same(load(f"{a}/g.pt")["generator"], load(f"{b}/g.pt")["generator"])


def test_resume_is_exact_and_so_is_a_second_run():
    assert train.main([*LONG, "whole"]) == 0
    for epochs in "012":  # stopped at the change of phase, and within the second
        assert train.main([*LONG, "parts", "--epochs", epochs, "--resume"]) == 0
    assert_same_run("whole", "parts")


SCRIPT = "import sys, train; train.SAVE_SECONDS = 0; sys.exit(train.main(sys.argv[1:]))"


def test_a_killed_and_an_interrupted_run_resume_exactly():
    options = ["--epochs", "8", "--resume"]
    assert train.main([*LONG, "whole", *options]) == 0
    last = Path("stopped/last.pt")
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130),
                           (signal.SIGTERM, 130)):
        before = last.exists() and last.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, *LONG, "stopped", *options],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate()[1].strip()
        assert process.returncode == status and ("--resume goes on" in error) == (status == 130)
        assert len(error.splitlines()) <= 1
    assert train.main([*LONG, "stopped", *options]) == 0
    assert_same_run("whole", "stopped")


def test_saves_are_seconds_apart_and_the_last_epoch_is_saved(monkeypatch):
    saves, save = [], train.Run.save
    monkeypatch.setattr(train.Run, "save",
                        lambda run, photos: saves.append(run.epoch) or save(run, photos))
    monkeypatch.setattr(train, "SAVE_SECONDS", 1000)
    assert train.main([*LONG, "runs"]) == 0 and saves == [1, 4] and len(read_log()) == 4


def test_last_pt_is_written_last(monkeypatch):
    """A kill in between repeats epochs; the other way round it would lose them in log.csv."""
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(b.name) or replace(a, b))
    assert train.main(PRE) == 0
    assert written == ["epoch-0001.png", "g.pt", "log.csv", "last.pt", "test.txt", "test.png"]


@pytest.mark.parametrize("option, value", [
    ("--seed", "1"), ("--lambda-l1", "10.0"), ("--pretrain-epochs", "3"), ("--width", "8"),
    ("--lr", "0.1"), ("--amp", "bf16")])
def test_resume_refuses_other_options_before_it_reads_the_data(option, value, refused, monkeypatch):
    assert train.main(PRE) == 0
    assert load("runs/last.pt")["options"]["amp"] == "off"  # not auto: another device has another
    monkeypatch.setattr(train, "Photos", None)
    refused(train.main, [*PRE, "--resume", option, value], option, value, "the run in runs has")


def test_resume_refuses_fewer_epochs_than_were_done(refused):
    assert train.main([*PRE, "--epochs", "1"]) == 0
    refused(train.main, [*PRE, "--resume"], "--epochs 0: the run in runs has done 1")


def test_resume_takes_the_same_data_elsewhere_and_refuses_other_data(refused):
    command = "--size 32 --width 4 --batch-size 8 --pretrain-epochs 1 --epochs 0 --data".split()
    assert train.main([*command, str(make_photos("here"))]) == 0
    assert train.main([*command, str(make_photos("there")), "--resume", "--epochs", "1"]) == 0
    photo(seed=77).save("there/a/00.png")
    data.Photos("there", 32, 0)  # into the cache, which is no damage
    refused(train.main, [*command, "there", "--resume", "--epochs", "1"],
            "--data there: not the images")


def test_a_run_is_not_overwritten(refused, capsys):
    assert train.main([*PRE, "--resume"]) == 0
    assert "starting afresh" in capsys.readouterr().out
    refused(train.main, PRE, "--out runs: File exists", "--resume")
    for name in ("last.pt", "g.pt"):  # log.csv alone marks the folder, from the first moment on
        Path("runs", name).unlink()
    refused(train.main, PRE, "--out runs: File exists", "--resume")
    assert train.main([*PRE, "--resume"]) == 0  # as when it was killed before its first save


@pytest.mark.parametrize("pretrain", ["0", "1"])
def test_init_starts_both_phases_from_another_generator(pretrain, refused):
    assert train.main([*PRE, "--out", "first"]) == 0
    command = "--data demo --size 48 --width 4 --device cpu --init first/g.pt".split()
    still = ["--pretrain-epochs", pretrain, "--epochs", str(1 - int(pretrain)),
             "--pretrain-lr", "0", "--lr", "0"]
    assert train.main([*command, *still]) == 0  # at another size; with no step, the same weights
    states = [load(f"{out}/g.pt")["generator"] for out in ("first", "runs")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0] if n.endswith("weight"))
    assert same(load("runs/last.pt")["generator"]["head.bias"], states[0]["head.bias"])
    refused(train.main, [*command, "--width", "8", "--out", "wide"],
            "--width 8: --init first/g.pt has width 4")
    assert train.main([*command, *still, "--resume", "--init", "gone.pt"]) == 0  # no longer read


def test_g_pt_is_plain_and_rebuilds_the_ema():
    train.main(PRE)
    generator, info = models.load_generator("runs/g.pt", CPU)
    assert (info["size"], info["epoch"], info["seed"]) == (32, 1, 0) and not generator.training
    assert info["options"]["width"] == 4 and len(info["test_means"]) == 64
    json.dumps({k: v for k, v in load("runs/g.pt").items() if k != "generator"})  # plain types
    ema = models.UNet(4)
    ema.load_state_dict(load("runs/last.pt")["ema"])
    L = torch.rand(2, 1, 32, 32)
    assert torch.allclose(generator(L), ema.eval()(L), atol=5e-3)  # float16 has 11 bits


class Code:
    """Unpickling this would leave a file behind."""
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def bad_generators():
    """Files that are no g.pt, by kind."""
    state = models.UNet(4).state_dict()
    good = {"generator": state} | INFO
    first = torch.zeros(1, 1, 3, 3).expand(5000, -1, -1, -1)
    wide = {"generator": state | {"down1.0.weight": first}}
    nan = state | {"head.bias": torch.full((2,), math.nan)}
    changed = {f"new.{name}": value for name, value in state.items()}
    kinds = {"code": Code(), "other": {"model": state}, "tensor": torch.zeros(3),
             "unfit": good | {"generator": {}}, "changed": good | {"generator": changed},
             "wide": good | wide, "nan": good | {"generator": nan},
             "size": good | {"size": 10**9}, "seed": good | {"seed": "x"}}
    blobs = {"empty": b"", "text": b"hello", "missing": None}
    for kind, content in kinds.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        blobs[kind] = buffer.getvalue()
    return blobs | {"cut": blobs["nan"][:-200]}


BAD = bad_generators()


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints_are_one_line_and_run_no_code(kind, refused):
    if BAD[kind] is not None:
        Path("bad.pt").write_bytes(BAD[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(sample.main, ["--ckpt", "bad.pt", str(HERE / "in"), "out"], "bad.pt")
    refused(train.main, ["--data", "demo", "--eval", "bad.pt"], "bad.pt")
    refused(train.main, [*TINY, "--init", "bad.pt"], "bad.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_damaged_last_pt_or_changed_networks_are_refused(refused, monkeypatch):
    assert train.main(PRE) == 0
    good = load("runs/last.pt")
    command = [*PRE, "--epochs", "1", "--resume"]
    for kind in ("cut", "empty", "other", "code"):
        Path("runs/last.pt").write_bytes(BAD[kind])
        refused(train.main, command, "runs/last.pt")
    for change in [{name: None} for name in good] + [{"epoch": "x"}, {"log": 3}, {"options": {}}]:
        torch.save(good | change, "runs/last.pt")
        if change not in ({"scaler": None}, {"contents": None}):
            refused(train.main, command, "runs/last.pt", "does not fit this code, or is damaged")
    for name in good:
        torch.save({k: v for k, v in good.items() if k != name}, "runs/last.pt")
        refused(train.main, command, "runs/last.pt")
    torch.save(good, "runs/last.pt")
    class Wider(models.UNet):  # what coursework does
        def __init__(self, width):
            super().__init__(width)
            self.head = nn.Conv2d(width, 2, 3, padding=1)
    monkeypatch.setattr(train, "UNet", Wider)
    refused(train.main, command, "runs/last.pt", "size mismatch", "another --out")


# --- Several processes ---------------------------------------------------------------------------

WORKER = """
import os, sys, torch, torch.distributed as dist, data, models, train

rows, average, batch = [], train.average, data.Photos.batch

def check_averages():
    # The averaged gradient of two halves is the whole's, on the critic (no batch norm).
    rank = dist.get_rank()
    torch.manual_seed(0)
    critic, lab = models.PatchCritic(4), torch.rand(8, 3, 32, 32)
    gradients = []
    for part in (lab, lab[rank::2]):
        critic.zero_grad()
        critic(part).square().mean().backward()
        gradients.append([p.grad.clone() for p in critic.parameters()])
    average(p.grad for p in critic.parameters())
    whole, part = gradients
    averaged = [p.grad for p in critic.parameters()]
    close = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-7)  # order of summation
    assert all(map(close, whole, averaged)) and not all(map(close, part, averaged))

def spy(photos, chosen, crop=False):
    if crop:
        rows.append((chosen.tolist(), torch.initial_seed()))
    return batch(photos, chosen, crop)

class Run(train.Run):
    def check_finite(self, means, epoch):
        check_averages()
        everyone = [None, None]
        dist.all_gather_object(everyone, means)
        assert everyone[0] == everyone[1]  # the terms too
        networks = (self.generator, self.critic, self.ema)
        weights = [list(network.parameters()) for network in networks]
        torch.save([weights, rows], f"{epoch}-{dist.get_rank()}.pt")
        rows.clear()
        super().check_finite(means, epoch)

data.Photos.batch, train.Run = spy, Run
sys.exit(train.main(sys.argv[1:]))
"""


def torchrun(script, *options):
    Path("worker.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "worker.py", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_processes_share_each_batch_and_stay_bit_identical():
    result = torchrun(WORKER, *TINY, "--pretrain-epochs", "1", "--epochs", "1")
    assert result.returncode == 0, result.stderr
    for epoch in range(2):
        (a, rows_a), (b, rows_b) = [torch.load(f"{epoch}-{rank}.pt") for rank in range(2)]
        assert same(a, b) and len(rows_a) == len(rows_b) == 9
        rng = np.random.default_rng([0, epoch])  # as with one process
        order = data.Photos("demo", 32, 0).train[rng.permutation(300)].tolist()
        for i, ((chosen_a, seed_a), (chosen_b, seed_b)) in enumerate(zip(rows_a, rows_b)):
            assert sorted(chosen_a + chosen_b) == sorted(order[32 * i : 32 * i + 32])
            assert len(chosen_a) == 16 and seed_a != seed_b  # other crops and mixes
    assert result.stdout.count("epoch 2/2") == 1 and len(read_log()) == 2  # rank 0 alone
    assert load("runs/last.pt")["options"]["processes"] == 2


def test_processes_that_see_other_images_are_refused():
    for rank in "01":
        make_photos(f"{rank}/photos", 20)
    Path("1/photos/a/00.png").unlink()
    script = ("import os, sys, train; os.chdir(os.environ['RANK']); "
              "sys.exit(train.main(sys.argv[1:]))")
    result = torchrun(script, *"--data photos --size 32 --width 4 --batch-size 4".split())
    assert result.returncode and "--data photos, --out runs: not the same images" in result.stderr
    assert 'train.py", line' not in result.stderr  # no traceback but torchrun's own


def test_batches_divide_among_processes(refused, monkeypatch):
    monkeypatch.setattr(train, "join_processes",
                        lambda args: setattr(args, "processes", 3) or (CPU, 0))
    refused(train.main, TINY, "--batch-size 32: not a multiple of 3 processes")


@pytest.mark.parametrize("name, value", [("RANK", "1"), ("WORLD_SIZE", "2"), ("WORLD_SIZE", "abc")])
def test_variables_without_torchrun_change_nothing(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert train.main(PRE) == 0 and Path("runs/g.pt").exists()


# --- Sampling ------------------------------------------------------------------------------------

class Fixed(nn.Module):
    """A generator of known output: ab is an affine function of L."""

    def __init__(self, slope, offset):
        super().__init__()
        self.head = nn.Conv2d(1, 2, 1)
        self.head.weight.data[:, 0, 0, 0] = torch.tensor(slope)
        self.head.bias.data[:] = torch.tensor(offset)

    def forward(self, L):
        return self.head(L)


@pytest.mark.parametrize("offset", [(0.3, 0.0), (0.0, 0.3), (-0.2, 0.1)])
def test_colour_is_what_the_network_says(offset):
    image, psnr = sample.colorize(Fixed((0.0, 0.0), offset), Image.new("L", (40, 30), 120), 16)
    lab = rgb2lab(np.asarray(image))
    assert psnr is None and image.size == (40, 30)
    assert np.abs(lab[..., 1:] - np.multiply(offset, 110)).max() < 1  # 8 bits


def test_colour_is_where_the_network_says():
    ramp = Image.fromarray(np.tile(np.linspace(60, 180, 64).astype(np.uint8), (48, 1)))
    for image in (ramp, ramp.convert("RGB")):
        lab = rgb2lab(np.asarray(sample.colorize(Fixed((0.3, 0.0), (0.0, 0.0)), image, 64)[0]))
        expected = (lab[..., 0] / 50 - 1) * 0.3 * 110
        assert np.abs(lab[..., 1] - expected).max() < 2  # 8 bits, and bicubic edges


def test_strips_have_no_seams(ckpt, monkeypatch):
    generator, info = models.load_generator(ckpt, CPU)
    for mode in ("RGB", "L"):
        image = photo((90, 301), mode=mode)
        whole = sample.colorize(generator, image, 32)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "STRIP", 90 * 7)
            strips = sample.colorize(generator, image, 32)
        assert np.array_equal(whole[0], strips[0])
        assert whole[1] == strips[1] or whole[1] == pytest.approx(strips[1])


def test_toned_prints_are_black_and_white():
    tones = {"sepia": ((30, 15, 5), (255, 240, 200)), "cyan": ((10, 10, 40), (230, 240, 255)),
             "grey": ((0, 0, 0), (255, 255, 255))}
    from PIL import ImageOps
    for dark, light in tones.values():
        toned = ImageOps.colorize(GREY, dark, light)
        toned = Image.open(io.BytesIO(saved(toned, "JPEG", quality=75)))
        assert sample.colorize(Fixed((0.0, 0.0), (0.0, 0.0)), toned, 32)[1] is None
    assert sample.colorize(Fixed((0.0, 0.0), (0.0, 0.0)), COLOUR, 32)[1] is not None


def test_jpegs_are_written_at_quality_95_without_subsampling(ckpt, capsys):
    COLOUR.save("a.jpg", quality=30)
    assert sample.main(["--ckpt", ckpt, "a.jpg", "out", "--grid", "0"]) == 0
    assert capsys.readouterr().out.startswith("a.jpg: ")  # decibels, also without a grid
    with Image.open("out/a.jpg") as made, Image.open(io.BytesIO(
            saved(COLOUR, "JPEG", quality=95, subsampling=0))) as expected:
        assert made.quantization == expected.quantization and made.layer == expected.layer


def test_a_folder_is_mirrored_measured_and_shown(ckpt, capsys):
    Path("in/sub/deep").mkdir(parents=True)
    Path("elsewhere").mkdir()
    for path in ("in/a.JPG", "in/sub/a.jpg", "in/sub/deep/grey.png", "elsewhere/linked.png"):
        (GREY if "grey" in path else COLOUR).save(path)
    Path("in/link.png").symlink_to(Path("elsewhere/linked.png").resolve())
    Path("in/folder").symlink_to(Path("elsewhere").resolve())
    for name in ("notes.txt", "b.heic", "c.HEIC", "README", "._a.jpg", ".DS_Store"):
        Path("in", name).write_text("left alone")
    os.mkfifo("in/pipe.png")
    for _ in range(2):  # an earlier run's outputs are replaced
        before = tree("in")
        assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
        assert sorted(tree("out")) == ["out/a.JPG", "out/grid.png", "out/link.png", "out/sub/a.jpg",
                                       "out/sub/deep/grey.png"]
        assert tree("in") == before
        out = capsys.readouterr().out
        assert out.count(" dB\n") == 3 and "4 colorized" in out and "3 that had colour" in out
        assert "0 failed; no pictures: 2 .heic, 1 .txt, 1 no suffix" in out
        assert out.splitlines()[-1] == "the results are in out, 4 of them in out/grid.png"
    with Image.open("out/a.JPG") as image, Image.open("in/a.JPG") as real:
        assert image.format == "JPEG"
        psnr = peak_signal_noise_ratio(np.asarray(real), np.asarray(image))
    said = float(out.split("a.JPG: ")[1].split()[0])
    assert said == pytest.approx(psnr, abs=0.3)  # before JPEG's own loss
    with Image.open("out/grid.png") as image:  # three rows, and a line of names
        assert image.size == (4 * 258, 3 * 258 + 24)
        cells = np.asarray(image).astype(int)
    grey, fake, real = [cells[y : y + 256, :256] for y in (0, 258, 516)]
    assert np.ptp(grey, 2).max() == 0 < np.ptp(fake, 2).max()
    for made in (grey, fake):  # the same lightness, not luma
        made, seen = (rgb2lab(cell[60:190].astype(np.uint8))[..., 0] for cell in (made, real))
        assert np.abs(made - seen).mean() < 1  # JPEG's loss
    assert np.abs(real[128] - np.asarray(COLOUR.resize((256, 189)))[94]).max() < 25  # JPEG's loss
    assert (cells[516:774, 3 * 258 :] == 255).all()  # the grey one has no third row
    assert all((cells[774:, x : x + 256] < 128).any() for x in range(0, 4 * 258, 258))  # a name


def test_grid_pages(ckpt, capsys):
    Path("in").mkdir()
    for i in range(11):
        image = GREY if i else GREY.resize((1, 2000))  # a line: a side of it would be 0
        image.save(f"in/{i:02}-{'ü☃' * 20}.png")
    assert sample.main(["--ckpt", ckpt, "in", "out", "--grid", "10"]) == 0
    sizes = []
    for name in ("grid.png", "grid-2.png"):
        with Image.open(f"out/{name}") as image:
            sizes.append(image.size)
    assert sizes == [(8 * 258, 2 * 258 + 24), (2 * 258, 2 * 258 + 24)]  # grey: no third row
    assert "10 of them in out/grid.png to grid-2.png" in capsys.readouterr().out
    assert len(tree("out")) == 13
    for path, name in (("a.png", "Blüte.png"), ("b.png", "Blute.png"), ("c.png", "Blte.png")):
        sample.draw_grid([(name, [GREY])], Path(path))  # the font has ASCII alone
    a, b, c = [Path(path).read_bytes() for path in ("a.png", "b.png", "c.png")]
    assert a == b != c


def test_no_two_inputs_share_an_output(ckpt):
    Path("in").mkdir()
    Path("in/grid-2.png").mkdir()
    for name in ("a.gif", "a.gif.png", "a.png", "grid.png", "grid-2.png/a.png"):
        GREY.save(Path("in", name))
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
    assert sorted(tree("out")) == [
        "out/a.gif.png", "out/a.gif.png.png", "out/a.png", "out/grid-2.png/a.png",
        "out/grid-3.png", "out/grid.png"]


def test_a_linked_input_is_never_overwritten(ckpt, refused):
    make_photos("in", 2)
    Path("out").mkdir()
    GREY.save("in/grid.png")
    GREY.save("out/grid-2.png")
    Path("in/link.png").symlink_to(Path("out/grid-2.png").resolve())
    refused(sample.main, ["--ckpt", ckpt, "in", "out"], "would overwrite the input out/grid-2.png")
    COLOUR.save("in/b.gif")
    GREY.save("out/b.gif.png")
    Path("in/link.png").unlink()
    Path("in/link.png").symlink_to(Path("out/b.gif.png").resolve())
    refused(sample.main, ["--ckpt", ckpt, "in", "out"], "would overwrite the input out/b.gif.png")
    Path("other").mkdir()
    Path("other/a").symlink_to(Path("in").resolve())
    refused(sample.main, ["--ckpt", ckpt, "in", "other"], "other/a lies in the input folder")


def test_skip_existing_goes_on_after_ctrl_c(ckpt, capsys, monkeypatch):
    make_photos("in", 6)
    GREY.save("in/z.gif")  # goes to z.gif.png
    seen, colorize_file = [], sample.colorize_file
    def interrupted(*args):
        seen.append(args)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        if len(seen) > 3:
            time.sleep(0.3)
        return colorize_file(*args)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "colorize_file", interrupted)
        assert sample.main(["--ckpt", ckpt, "in", "out"]) == 130
    out, err = capsys.readouterr()
    assert "4 colorized" in out and "out/grid.png" in out and Path("out/grid.png").exists()
    assert err == "stopped after 4 of 7; --skip-existing goes on\n"
    assert len(tree("out")) == 5  # the picture in hand was finished; and the grid
    before = {path: os.stat(path).st_mtime_ns for path in tree("out") if "grid" not in path}
    assert sample.main(["--ckpt", ckpt, "in", "out", "--skip-existing"]) == 0
    assert "3 colorized" in (out := capsys.readouterr().out) and "4 done before" in out
    assert "3 of them in out/grid-2.png" in out  # the first page stays
    assert all(os.stat(path).st_mtime_ns == when for path, when in before.items())
    assert sample.main(["--ckpt", ckpt, "in", "out", "--skip-existing"]) == 0  # nothing left to do
    assert "0 colorized, 0 failed, 7 done before" in capsys.readouterr().out
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
    assert "7 colorized" in capsys.readouterr().out


def test_broken_files_and_folders_are_named_and_the_others_colorized(ckpt, capsys, monkeypatch):
    make_photos("in", 3)
    png = Path("in/a/00.png").read_bytes()
    Path("in/empty.png").write_bytes(b"")
    Path("in/cut.png").write_bytes(png[: len(png) // 2])
    Path("in/gone.png").symlink_to("nowhere")
    huge = bytearray(png)
    huge[16:24] = struct.pack(">2I", 60000, 60000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    Path("in/huge.png").write_bytes(huge)
    Path("in", "\x1b[31m\nred.png").write_text("no picture")
    deep_folder("in")
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 1
    out, err = capsys.readouterr()
    names = [line.split(": not ")[0] for line in err.splitlines()]
    assert names[0].startswith("in/ddd") and names[1:] == [
        "in/\\x1b[31m\\nred.png", "in/cut.png", "in/empty.png", "in/gone.png", "in/huge.png"]
    assert "3 colorized" in out and "6 failed" in out and len(tree("out")) == 4
    capsys.readouterr()
    # No memory, and no room: said by picture.
    def failing(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sample, "colorize", failing)
    assert sample.main(["--ckpt", ckpt, "in/a", "none"]) == 1 and not Path("none").exists()
    assert "in/a/00.png: not colorized: CUDA out of memory" in capsys.readouterr().err


def test_odd_names_and_folders(ckpt, capsys, refused):
    Path("in").mkdir()
    for name in ("n" * 246 + ".png", os.fsdecode(b"caf\xe9.png"), "a b: ü.png"):
        photo().save(Path("in", name))
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
    assert "caf\\udce9.png: " in capsys.readouterr().out and len(tree("out")) == 4
    refused(sample.main, ["--ckpt", ckpt, "in/a b: ü.png", "/proc/none"], "/proc/none", status=1)
    Path("empty").mkdir()
    refused(sample.main, ["--ckpt", ckpt, "empty", "none"], "no file with the suffix", status=1)


def test_names_beyond_the_terminals_encoding_are_escaped():
    for encoding, expected in (("ascii", "\\xfc.jpg \\u2603"), ("cp1252", "ü.jpg \\u2603")):
        file = io.TextIOWrapper(buffer := io.BytesIO(), encoding=encoding)
        data.say("ü.jpg ☃", file)
        assert buffer.getvalue().decode(encoding) == expected + "\n"


@pytest.mark.parametrize("shell, status", [("2>&-", 1), ("| true", 0), (">/dev/full", 1)])
def test_closed_and_full_outputs_make_no_traceback(shell, status, ckpt):
    """One picture, one broken file."""
    Path("in").mkdir()
    COLOUR.save("in/a.png")
    Path("in/b.png").touch()
    command = f"{sys.executable} {HERE / 'sample.py'} --ckpt {ckpt} in out {shell}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == status and "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_closed_terminal_ends_sampling_as_ctrl_c_does(ckpt):
    make_photos("in", 200)
    process = subprocess.Popen([sys.executable, HERE / "sample.py", "--ckpt", ckpt, "in", "out"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not Path("out").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate()
    assert process.returncode == 130 and "--skip-existing goes on" in err
    assert not list(Path("out").rglob(".*")) and "Traceback" not in err


def mutate(blob, others, rng):
    """Break a file: flip bits, cut it, or splice it with another."""
    blob = bytearray(blob)
    kind = rng.randrange(3)
    if kind == 0:
        for _ in range(rng.choice((1, 4, 30))):
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del blob[rng.randrange(len(blob)) :]
    else:
        other = rng.choice(others)
        blob[rng.randrange(len(blob)) :] = other[rng.randrange(len(other)) :]
    return bytes(blob)


def test_mutated_files_are_colorized_or_named(ckpt, capsys):
    """MUTATIONS files (300): each is written or named, within bounds of time and memory."""
    seeds, rng = {}, random.Random(0)
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "gif"):
        seeds[suffix] = saved(photo((60, 45)), Image.registered_extensions()[f".{suffix}"])
    Path("in").mkdir()
    count = int(os.environ.get("MUTATIONS", 300))
    for i in range(count):
        suffix = rng.choice(sorted(seeds))
        Path(f"in/{i:05}.{suffix}").write_bytes(mutate(seeds[suffix], list(seeds.values()), rng))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, lambda *_: pytest.exit("a broken file hangs"))
    signal.alarm(60 + count // 10)
    try:
        assert sample.main(["--ckpt", ckpt, "in", "out"]) == 1
    finally:
        signal.alarm(0)
    errors = capsys.readouterr().err.splitlines()
    named = {line.split(":")[0] for line in errors if line.startswith("in/")}
    written = {f"in/{p.name}".replace(".gif.png", ".gif") for p in Path("out").iterdir()}
    assert {f"in/{p.name}" for p in Path("in").iterdir()} == named | (written - {"in/grid.png"})
    assert not named & written and len(named) > count / 10 and len(written) > count / 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert peak < 2**20  # KiB: 1 GiB
    print(f"{len(named)} named, {len(written) - 1} colorized, {peak / 1024:.0f} MiB at most")


# --- Command-line mistakes -----------------------------------------------------------------------

@pytest.mark.parametrize("options, named", [line.split(" | ") for line in """
--size 100 | --size
--size 16 | --size
--size 1000000 | --size
--size big | --size
--width 0 | --width
--width 10000 | --width
--batch-size 0 | --batch-size
--batch-size 2.5 | --batch-size
--batch-size NINES | --batch-size
--data demo --batch-size 1000000 | --batch-size
--epochs -1 | --epochs
--pretrain-epochs -1 | --pretrain-epochs
--epochs 0 --pretrain-epochs 0 | --epochs
--critic-steps 0 | --critic-steps
--generator-steps 0 | --generator-steps
--lambda-l1 -1 | --lambda-l1
--lambda-gp nan | --lambda-gp
--lr -1 | --lr
--lr inf | --lr
--pretrain-lr fast | --pretrain-lr
--ema 1.5 | --ema
--amp fp8 | --amp
--device gpu | --device
--device hpu | --device
--device meta | --device
--device cuda:99 | --device
--seed -1 | --seed
--sample-every 0 | --sample-every
--data file.txt | --data
--data absent | --data
--data demo --out file.txt/x | --out
--data demo --out file.txt | --out
--data photos --out photos/runs | --out photos/runs
--data photos --eval g.pt --out photos/runs | --out photos/runs
--data demo --eval GOOD --out file.txt | file.txt
--frobnicate | --frobnicate
--epochs | --epochs
""".strip().splitlines()])
def test_train_mistakes_are_one_line(options, named, ckpt, refused):
    Path("photos").mkdir()
    Path("file.txt").write_text("no picture")
    options = options.replace("NINES", "9" * 401).replace("GOOD", ckpt).split()
    refused(train.main, [*options, "--width", "4"] if "demo" in options else options, named,
            status=1 if ckpt in options else 2)


@pytest.mark.parametrize("command, named", [
    ("missing out", "missing"), ("in in", "out in"), ("in in/out", "in/out"),
    ("in/a/00.png in/a", "overwrite"), ("in file", "out file"), ("in/a/00.png b.jpg", "out b.jpg"),
    ("in", "out"), ("in out --device gpu", "--device"), ("in out --size 3", "--size"),
    ("in out --grid -1", "--grid")])
def test_sample_mistakes_are_one_line(command, named, ckpt, refused):
    make_photos("in", 2)
    Path("file").touch()
    refused(sample.main, ["--ckpt", ckpt, *command.split()], named)


def test_out_of_memory_and_ctrl_c_are_one_line(capsys, monkeypatch):
    for error, status, said in (
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower --batch-size"),
            (torch.OutOfMemoryError("CUDA out of memory."), 1, "lower --batch-size"),
            (KeyboardInterrupt(), 130, "stopped")):
        def work():
            raise error
        assert data.run_command("train.py", work) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    with pytest.raises(RuntimeError, match="a bug"):  # of a fork: its traceback is wanted
        data.run_command("train.py", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize("script", [train, sample])
def test_help_shows_usage_text_and_defaults(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.startswith(f"usage: python {script.__name__}.py [options]")
    assert "\n    python " in out and "(default: auto)" in out
    assert script is sample or "(default: 0)" in out


def test_the_shipped_generator_is_the_default():
    assert sample.parse_args(["in", "out"]).ckpt == HERE / "g.pt"

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
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from skimage.color import lab2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

import data
import models
import sample
import train

TINY = "--data demo --size 32 --width 4 --device cpu"
PRE = f"{TINY} --pretrain-epochs 1 --epochs 0"  # a second
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


def train_py(command):
    """The command line of train.py. Returns the exit status."""
    return train.main(command.split())


@pytest.fixture
def sample_py(ckpt):
    """The command line of sample.py, with a generator for tests."""
    return lambda command: sample.main(["--ckpt", ckpt, *command.split()])


@pytest.fixture
def refused(capsys):
    """Check that a command fails with one line, which names what is wrong, and writes nothing."""
    def check(program, command, *named, status=2):
        before = tree()
        capsys.readouterr()
        try:
            got = program(command)
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


def put(image, *paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def make_photos(folder, count=20):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        put(photo(seed=i), Path(folder, "ab"[i % 2], f"{i:02}.png"))
    return Path(folder)


def spoil(folder):
    """Add files and folders that cannot be read to a folder."""
    png = saved(COLOUR, "PNG")
    huge = bytearray(png)
    huge[16:24] = struct.pack(">2I", 60000, 60000)  # its sides, and their checksum
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    for name, blob in {"cut.png": png[: len(png) // 2], "empty.png": b"", "huge.png": huge,
                       "\x1b[31m\nred.png": b"text", ".hidden.png": b"macOS leaves such"}.items():
        Path(folder, name).write_bytes(blob)
    Path(folder, "gone.png").symlink_to("nowhere")
    os.mkfifo(Path(folder, "pipe.png"))
    here = os.getcwd()
    os.chdir(folder)
    for _ in range(20):  # a path longer than the system takes
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    Path("a.png").write_bytes(png)
    os.chdir(here)


def tree(folder="."):
    """Every file below folder, with its content's hash."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_identical(a, b):
    """Equality, bit by bit, of nested checkpoints."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def read_log(out="runs"):
    with open(Path(out, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


# --- Colour --------------------------------------------------------------------------------------

def cube(low, high, n):
    axes = [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(low, high)]
    return torch.cartesian_prod(*axes).T.reshape(1, 3, n * n, n)


def to_numpy(image):
    return image.permute(0, 2, 3, 1).numpy()


@pytest.mark.filterwarnings("ignore:.*negative Z")
def test_colour_is_scikit_images_also_outside_the_gamut():
    rgb, lab = cube((0, 0, 0), (1, 1, 1), 41), cube((0, -128, -128), (100, 127, 127), 41)
    error = np.abs(to_numpy(data.rgb_to_lab(rgb.float())) - rgb2lab(to_numpy(rgb)))
    assert error.max() < 1e-3  # float32, and scikit-image's step at 0.008856
    error = np.abs(to_numpy(data.lab_to_rgb(lab.float())) - lab2rgb(to_numpy(lab)))
    assert error.max() < 1e-4  # float32


@pytest.mark.filterwarnings("ignore:.*negative Z")
def test_keep_lightness_changes_only_colours_outside_the_gamut():
    lab = cube((1, -100, -100), (99, 100, 100), 31)
    rgb = to_numpy(data.lab_to_rgb(lab.float(), keep_lightness=True))
    lab = to_numpy(lab)
    assert rgb.min() >= 0 and rgb.max() <= 1
    assert np.abs(rgb2lab(rgb)[..., 0] - lab[..., 0]).max() < 0.05  # float32
    inside = np.abs(rgb2lab(lab2rgb(lab)) - lab).max(-1) < 1e-3
    assert 3000 < inside.sum() < 9000 and np.abs(rgb - lab2rgb(lab))[inside].max() < 1e-4


def test_8_bit_colours_survive_the_way_to_the_networks_and_back():
    rgb = cube((0, 0, 0), (255, 255, 255), 52)
    lab = data.rgb_to_lab(rgb.float() / 255)
    back = data.lab_to_rgb(data.denormalize(*data.normalize(lab)))
    assert torch.equal((back * 255).round(), rgb.round().float())
    L, ab = data.normalize(torch.tensor([0.0, 110, -110]).view(1, 3, 1, 1))
    assert L.item() == -1 and ab.flatten().tolist() == [1, -1]


@pytest.mark.parametrize("convert, x", [
    (data.rgb_to_lab, cube((0, 0, 0), (1, 1, 1), 2)),
    (data.lab_to_rgb, cube((-500, -500, -500), (500, 500, 500), 11))])
def test_colour_is_differentiable_also_at_the_extremes(convert, x):
    x.requires_grad_()
    y = convert(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    rgb = torch.rand(1, 3, 3, 3, dtype=torch.float64) * 0.9 + 0.05
    x = (rgb if convert is data.rgb_to_lab else data.rgb_to_lab(rgb)).requires_grad_()
    assert torch.autograd.gradcheck(convert, x)


# --- Reading pictures ----------------------------------------------------------------------------

def saved(image, format, patch=None, **options):
    """A picture's file as bytes; patch: (tag, value) of a little-endian TIFF to overwrite."""
    best = {"JPEG": {"quality": 100}, "MPO": {"quality": 100},
            "WEBP": {"lossless": True, "exact": True}}
    buffer = io.BytesIO()
    image.save(buffer, format, **best.get(format, {}) | options)
    blob = buffer.getvalue()
    if patch:
        start = blob.index(struct.pack("<HHI", patch[0], 3, 1)) + 8
        blob = blob[:start] + struct.pack("<H", patch[1]) + blob[start + 2 :]
    return blob


def pgm(depth):
    values = (np.asarray(GREY) / 255 * depth).round().astype(">u2")
    return b"P5 50 37 %d\n" % depth + values.tobytes()


def chunk(kind, content):
    info = PngImagePlugin.PngInfo()
    info.add(kind, content)
    return info


def exif(tags):
    made = Image.Exif()
    made.update(tags)
    return made


# ICC profiles: sRGB, and of values proportional to light, of RGB and of grey.
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CURVE = SRGB.index(b"para") + 12  # (a x + b) ** g above d
LIGHT_RGB = SRGB[:CURVE] + struct.pack(">5i", 65536, 65536, 0, 65536, 0) + SRGB[CURVE + 20 :]
WHITE = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
LIGHT_GREY = (
    struct.pack(">I4sI4s4s4s", 188, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12)
    + b"acsp" + bytes(28) + WHITE[8:] + bytes(48)
    + struct.pack(">I4s2I4s2I", 2, b"wtpt", 156, 20, b"kTRC", 176, 12) + WHITE + b"curv" + bytes(8))

GREY, COLOUR = photo((50, 37), mode="L"), photo((50, 37))
MASK = photo((50, 37), seed=5, mode="L")
TWO_PAGES = {"save_all": True, "append_images": [MASK]}
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
RAMP = np.linspace(-3.0, 9.0, 50 * 37).reshape(37, 50)
RAMP_GREY = Image.fromarray(((RAMP + 3) * 255 / 12).round().astype(np.uint8))
RAMP_32 = Image.fromarray((RAMP * 1e8).astype(np.int32))
LIGHT = np.asarray(GREY) / 255  # GREY, if its values were proportional to light
LINEAR = Image.fromarray((255 * np.where(
    LIGHT > 0.0031308, 1.055 * LIGHT ** (1 / 2.4) - 0.055, 12.92 * LIGHT)).round().astype(np.uint8))
RGBA = Image.merge("RGBA", (*COLOUR.split(), MASK))
PALETTE = COLOUR.quantize(16)
KEYED = PALETTE.copy()
KEYED.info["transparency"] = 3
LAB = ImageCms.profileToProfile(
    COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
T = Image.Transpose

PICTURES = {name: (blob, GREY) for name, blob in {
    "grey.png": saved(GREY, "PNG"), "grey.bmp": saved(GREY, "BMP"), "grey.jpg": saved(GREY, "JPEG"),
    "grey.webp": saved(GREY, "WEBP"), "grey.tif": saved(GREY, "TIFF", compression="tiff_lzw"),
    "16-bit.png": saved(DEEP, "PNG"), "16-bit.tif": saved(DEEP, "TIFF"),
    "16-bit-big.tif": saved(Image.fromarray(np.asarray(DEEP).astype(">u2")), "TIFF"),
    "16-bit.pgm": pgm(65535), "12-bit.pgm": pgm(4095),
    "page.gif": saved(GREY, "GIF", **TWO_PAGES), "pages.tif": saved(GREY, "TIFF", **TWO_PAGES),
    "broken-page.tif": saved(GREY, "TIFF", **TWO_PAGES)[: len(saved(GREY, "TIFF")) + 20],
    "views.mpo": saved(GREY, "MPO", **TWO_PAGES),
    "other-icc.png": saved(GREY, "PNG", icc_profile=SRGB),
    "broken-icc.png": saved(GREY, "PNG", icc_profile=b"broken"),
    "usual-gamma.png": saved(GREY, "PNG", pnginfo=chunk(b"gAMA", struct.pack(">I", 45455))),
    "broken-exif.png": saved(GREY, "PNG", exif=b"Exif\0\0II*\0\xff\xff\0\0\xff"),
    "long-text.png": saved(
        GREY, "PNG", pnginfo=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 << 20)))),
}.items()} | {  # name: its file, what its lightness is to be, its alpha if any
    "32-bit.tif": (saved(RAMP_32, "TIFF"), RAMP_GREY),
    "float.tif": (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), RAMP_GREY),
    "infinite.tif": (saved(Image.fromarray(np.where(RAMP == 9, np.inf, RAMP).astype(np.float32)),
                           "TIFF"), RAMP_GREY),
    "bit.png": (saved(GREY.convert("1"), "PNG"), GREY.convert("1")),
    "grey-alpha.png": (saved(Image.merge("LA", (GREY, MASK)), "PNG"), GREY, MASK),
    "palette.png": (saved(PALETTE, "PNG"), PALETTE),
    "key.png": (saved(KEYED, "PNG"), PALETTE, KEYED.convert("RGBA").getchannel("A")),
    "rgb.png": (saved(COLOUR, "PNG"), COLOUR),
    "map.ppm": (saved(COLOUR, "PPM"), COLOUR),
    "rgba.png": (saved(RGBA, "PNG"), COLOUR, MASK),
    "rgba.webp": (saved(RGBA, "WEBP"), COLOUR, MASK),
    "rgba.tif": (saved(RGBA, "TIFF"), COLOUR, MASK), "lab.tif": (saved(LAB, "TIFF"), COLOUR),
    "cmyk.tif": (saved(COLOUR.convert("CMYK"), "TIFF"), COLOUR),
    "cmyk.jpg": (saved(COLOUR.convert("CMYK"), "JPEG"), COLOUR),
    "grey-icc.png": (saved(GREY, "PNG", icc_profile=LIGHT_GREY), LINEAR),
    "icc.png": (saved(GREY.convert("RGB"), "PNG", icc_profile=LIGHT_RGB), LINEAR),
    "long-exif.jpg": (saved(COLOUR, "PNG", exif=exif({270: "x" * 70_000})), COLOUR),  # > 65,533
    "high-dpi.bmp": (saved(COLOUR, "TIFF", dpi=(4e9, 4e9)), COLOUR),  # BMP has 32 bits for it
    "gamma.png": (saved(GREY, "PNG", pnginfo=chunk(b"gAMA", struct.pack(">I", 100000))), LINEAR),
} | {f"{w}-{h}.png": (saved(GREY.resize((w, h)), "PNG"), GREY.resize((w, h)))
     for w, h in ((1, 1), (1, 300), (900, 2))
} | {f"turned-{number}.png": (saved(COLOUR, "PNG", exif=exif({0x0112: number})), upright)
     for number, upright in enumerate([COLOUR, *map(COLOUR.transpose, (
         T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270,
         T.TRANSVERSE, T.ROTATE_90))], 1)}


def lightness(image):
    return rgb2lab(np.asarray(image.convert("RGB")))[..., 0]


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_keeps_its_lightness_and_alpha(name, sample_py):
    blob, expected, *alpha = PICTURES[name]
    Path(name).write_bytes(blob)
    assert sample_py(f"{name} out --grid 0") == 0
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
    if name not in ("1-1.png", "bit.png"):  # black and white have no colour
        assert np.ptp(np.asarray(result.convert("RGB")).astype(int), axis=2).max() > 8
    if alpha:
        assert np.array_equal(result.convert("RGBA").getchannel("A"), *alpha)
    else:
        assert not result.has_transparency_data
    # Training reads it likewise.
    small = expected.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    seen = Image.fromarray(data.decode(Path(name), 16))
    assert np.abs(lightness(seen) - lightness(small)).max() < limit + 3  # rounded before resizing


REFUSED = {
    "12-bit.tif": saved(DEEP, "TIFF", (258, 12)), "white-is-0.tif": saved(DEEP, "TIFF", (262, 0)),
    "unsigned.tif": saved(RAMP_32, "TIFF", (339, 1)),
    "constant.tif": saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
    "nan.tif": saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "key.png": saved(DEEP, "PNG", transparency=DEEP.getpixel((0, 0))),
    "cut.png": saved(GREY, "PNG")[:-300], "empty.png": b"", "text.png": b"no picture",
    "alpha.jpg": saved(RGBA, "PNG"), "alpha.bmp": saved(RGBA, "PNG"),  # which these cannot keep
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_would_come_out_wrong_is_refused_by_name(name, sample_py, refused):
    Path(name).write_bytes(REFUSED[name])
    refused(sample_py, f"{name} out", f"{name}: not colorized: ", status=1)
    assert "alpha" in name or not data.decode(Path(name), 16).any()


def test_one_limit_of_pixels_holds_everywhere(monkeypatch, sample_py):
    photo((40, 30)).save("a.png")
    for limit, readable in ((1199, False), (1200, True)):
        monkeypatch.setattr(data, "MAX_PIXELS", limit)
        assert sample_py("a.png out") == (0 if readable else 1)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
        assert data.decode(Path("a.png"), 16).any() == readable


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_metadata_survives_where_the_format_has_a_place(suffix, sample_py):
    when = "1921:05:04 03:02:01"
    tags = exif({270: "Aunt Vera's roses", 306: when, 0x0112: 6, 259: 7, 0x8769: {0x9003: when}})
    options = {"jpg": {"comment": b"scanned"}, "png": {"pnginfo": chunk(b"tEXt", b"Author\0Anna")}}
    COLOUR.save(f"a.{suffix}", exif=tags.tobytes(), dpi=(300, 300), **options.get(suffix, {}))
    assert sample_py(f"a.{suffix} out") == 0
    with Image.open(f"out/a.{suffix}") as image:
        image.load()
    found = image.getexif()
    assert (found[270], found[306]) == ("Aunt Vera's roses", when) and 0x0112 not in found
    assert found.get_ifd(0x8769)[0x9003] == when and image.size == (37, 50)
    assert found.get(259) != 7  # how the file was compressed, not the picture
    if suffix != "webp":
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
    assert suffix != "jpg" or image.info["comment"] == b"scanned"
    assert suffix != "png" or image.text == {"Author": "Anna"}


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
    folder = make_photos("photos", 30)
    for i in range(20):  # by chance alone, 20 pairs would all stay together once in 10^6 runs
        put(photo(seed=i), folder / f"copy-{i}.png")
    photos = data.Photos(folder, 32, seed=0)
    parts = (photos.train, photos.val, photos.test)
    different = [{photos.images[row].numpy().tobytes() for row in rows} for rows in parts]
    assert sum(map(len, parts)) == 50 and sum(map(len, different)) == len(set.union(*different))


def test_the_cache_serves_until_a_file_changes_and_is_never_written_to(monkeypatch):
    folder, decoded, decode = make_photos("photos"), [], data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(args) or decode(*args))
    path, large = folder / "new.bmp", photo((200, 200))  # not compressed: sizes are equal
    far = large.copy()
    far.putpixel((100, 60), (1, 2, 3))  # beyond the bytes that are looked at: the time tells
    before = set()
    for image, time_ns, decodes in ((None, 0, 20), (photo(seed=98), 10**18, 21),
                                    (photo(seed=98), 10**18, 0), (photo(seed=97), 10**18, 21),
                                    (large, 10**18, 21), (far, 10**18 + 1000, 21), (None, 0, 0)):
        path.unlink(missing_ok=True)
        if image:
            image.save(path)
            os.utime(path, ns=(time_ns, time_ns))
        decoded.clear()
        photos = data.Photos(folder, 32, 0)
        assert len(decoded) == decodes and (photos.contents in before) == (decodes == 0)
        before.add(photos.contents)
        photos.images[:] = 0  # in memory alone
    assert len(tree("cache")) == 5  # one whole file each, no remains


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"text"])
def test_a_damaged_cache_is_made_anew(damage):
    folder = make_photos("photos")
    contents = data.Photos(folder, 32, 0).contents
    (cached,) = Path("cache").iterdir()
    whole = cached.read_bytes()
    assert len(whole) == 20 * 48 * 48 * 3  # half as large again as training needs
    cached.write_bytes(damage(whole))
    assert data.Photos(folder, 32, 0).contents == contents and cached.read_bytes() == whole


def test_what_cannot_be_read_is_named_and_left_out(capsys):
    spoil(folder := make_photos("photos"))
    for _ in range(2):  # also when the cache is there
        photos = data.Photos(folder, 32, 0)
        assert sum(map(len, (photos.train, photos.val, photos.test))) == 20
        out = capsys.readouterr().out
        assert ("4 of 24 images left out, broken or all black: \\x1b[31m\\nred.png, cut.png, "
                "empty.png, huge.png") in out
        assert "2 files or folders cannot be read" in out and "gone.png (No such" in out
        assert "(File name too long)" in out


def test_a_passing_error_is_not_kept_as_a_black_picture(monkeypatch):
    folder, read_bytes = make_photos("photos"), Path.read_bytes
    def failing(path):
        if path.name == "00.png":
            raise OSError(5, "Input/output error")
        return read_bytes(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(data.UsageError, match="photos/a/00.png: Input/output error"):
            data.Photos(folder, 32, 0)
    assert len(data.Photos(folder, 32, 0).train) == 14


def test_black_and_white_photographs_are_a_warning(capsys):
    folder = make_photos("photos")
    for grey in range(1, 4):
        photo(seed=50 + grey, mode="L").save(folder / f"{grey}.png")
        data.Photos(folder, 32, 0)
        warning = f"warning: {grey} of {20 + grey} images are black and white"
        assert (warning in capsys.readouterr().out) == (grey == 3)  # more than a tenth


@pytest.mark.parametrize("count, message", [
    (0, "0 readable images"), (9, "9 readable images"), (-12, "too many identical images")])
def test_too_few_images_are_refused(count, message):
    make_photos("photos", count)
    put(photo(), *[f"photos/{i}.png" for i in range(-count)])
    with pytest.raises(data.UsageError, match=f"--data photos: {message}"):
        data.Photos("photos", 32, 0)


def test_a_full_disk_is_one_line_and_leaves_nothing(refused, capsys, monkeypatch):
    make_photos("photos")
    decoded, decode = [], data.decode
    def slow(*args):
        decoded.append(args)
        time.sleep(0.05)
        return decode(*args)
    monkeypatch.setattr(data, "decode", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    try:  # a limit of a file's size fails like a full disk, in the cache and in g.pt
        refused(train_py, "--data photos --out runs", "cannot write cache/", status=1)
        assert len(decoded) < 15  # of 20: the others are not waited for
        assert train_py(PRE) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot write runs/g.pt" in line and "is there room" in line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not any(".part" in path for path in tree())


def test_a_write_replaces_what_a_killed_one_left():
    parts = []
    for _ in range(2):
        with data.replacing(Path("out/a.txt")) as part:
            part.write_text("whole")
            parts.append(part)
    assert parts[0] == parts[1] and [p.name for p in Path("out").iterdir()] == ["a.txt"]


def test_only_the_default_folder_is_downloaded(monkeypatch, refused):
    from torchvision.datasets import Flowers102
    def fetch(self, root, download):
        make_photos(root / "flowers-102" / "jpg")
        if offline:
            raise RuntimeError("no route to host")
    offline = True
    monkeypatch.setattr(Flowers102, "__init__", fetch)
    refused(train_py, "--data brids", "--data brids: no folder")
    with pytest.raises(data.UsageError, match="by hand.*--data demo"):
        data.Photos("data", 32, 0)
    assert not Path("data").exists() and Path("data.part").exists()
    offline = False
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


def test_critic_initialisation_and_norms():
    layers = models.PatchCritic(64).layers
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    for c in convolutions:
        assert abs(c.weight.std() - 0.02) < 0.002 and abs(c.weight.mean()) < 0.002  # > 3000 weights
        assert c.bias is None or not c.bias.any()
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1, 1]
    names = [type(m).__name__ for m in layers]
    assert names == ["Conv2d", "LeakyReLU"] + ["Conv2d", "InstanceNorm2d", "LeakyReLU"] * 4 + [
        "Conv2d"]
    assert {m.negative_slope for m in layers if isinstance(m, nn.LeakyReLU)} == {0.2}


def test_critic_judges_each_image_alone():
    torch.manual_seed(0)
    critic, lab = models.PatchCritic(4), torch.rand(3, 3, 32, 32)
    assert critic(lab).shape == (3, 1, 1, 1)
    assert torch.allclose(critic(lab)[:1], critic(lab[:1]), atol=1e-6)  # other order of summation


# --- Losses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 3.0])
def test_penalty_of_a_linear_critic(norm):
    weight = torch.randn(1, 3, 8, 8)
    weight = (weight * norm / torch.linalg.vector_norm(weight[:, 1:])).requires_grad_()
    critic = lambda lab: (lab * weight).sum((1, 2, 3), keepdim=True)  # its gradient is the weight
    L, real, fake = torch.rand(4, 1, 8, 8), *torch.rand(2, 4, 2, 8, 8)
    penalty = train.gradient_penalty(critic, L, real, fake)
    assert penalty.item() == pytest.approx((norm - 1) ** 2, abs=1e-5)  # the norm over ab alone
    penalty.backward()
    slope = 2 * (norm - 1) * weight[:, 1:] / (norm or 1)  # d penalty / d weight; 0 at 0
    assert torch.allclose(weight.grad[:, 1:], slope, atol=1e-4)  # float32
    assert not weight.grad[:, :1].any()


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

@pytest.fixture
def run():
    args = train.parse_args(f"{TINY} --amp off".split())
    args.processes = 1
    return train.Run(args, CPU)


BATCH = torch.rand(4, 1, 32, 32) * 2 - 1, torch.rand(4, 2, 32, 32) * 2 - 1


def test_a_batch_is_one_critic_step_and_two_generator_steps(run, monkeypatch):
    steps, forwards, step = [], [], train.step
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


def test_logged_terms_are_what_they_are_called(run):
    for optimizer in (run.optimizer_g, run.optimizer_c):
        optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        fake = run.generator(BATCH[0])  # in training mode, as in the step
        real_score, fake_score = (train.score(run.critic, BATCH[0], x) for x in (BATCH[1], fake))
    gap, l1 = (real_score - fake_score).mean().item(), (fake - BATCH[1]).abs().mean().item()
    terms = {name: value.item() for name, value in train.adversarial_step(run, *BATCH).items()}
    assert terms["wasserstein"] == pytest.approx(gap, rel=1e-3) and gap != 0
    assert terms["adversarial"] == pytest.approx(-fake_score.mean().item(), rel=1e-3)
    assert terms["l1"] == pytest.approx(l1, rel=1e-4)
    assert train.pretrain_step(run, *BATCH)["l1"].item() == pytest.approx(l1, rel=1e-4)


def test_adam_is_the_papers_in_both_networks(run):
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
    command = f"{TINY} --pretrain-epochs 1 --epochs 1 --batch-size 30"
    assert train_py(command) == 0
    rows = set(data.Photos("demo", 32, 0).train.tolist())
    first, second = sum(batches[:10], []), sum(batches[10:], [])
    assert set(first) == set(second) == rows and len(first) == len(second) == 300  # once each
    assert first != second and first[:30] != sorted(first[:30])
    args = train.parse_args(command.split())
    expected = [train.learning_rate(args, (i + 0.5) / 10) for i in range(10)]
    assert rates == expected + [1e-4] * 30 and min(rates) > 0  # no step is lost at a rate of 0


def test_each_part_serves_its_purpose_and_the_average_is_what_counts(monkeypatch):
    evaluated, drawn, evaluate = [], [], train.evaluate
    def spy(predict, photos, rows, **options):
        evaluated.append(rows.tolist())
        return evaluate(predict, photos, rows, **options)
    monkeypatch.setattr(train, "evaluate", spy)
    monkeypatch.setattr(train, "save_picture", lambda generator, photos, rows, path:
                        drawn.append((str(path), rows.tolist())))
    assert train_py(PRE) == 0
    photos, last = data.Photos("demo", 32, 0), torch.load("runs/last.pt")
    val, test = photos.val.tolist(), photos.test.tolist()
    assert evaluated == [val] + [test] * 4
    assert drawn == [("runs/epoch-0001.png", val[:8]), ("runs/test.png", test[:8])]
    psnr = {}
    for name in ("ema", "generator"):
        network = models.UNet(4).eval()
        network.load_state_dict(last[name])
        psnr[name] = evaluate(lambda L, ab: network(L), photos, photos.val)["psnr"].mean().item()
    assert float(read_log()[0]["val_psnr"]) == pytest.approx(psnr["ema"], abs=1e-4)
    assert abs(psnr["ema"] - psnr["generator"]) > 0.01
    half = {k: v.half() if v.ndim > 1 else v for k, v in last["ema"].items()}
    assert_identical(torch.load("runs/g.pt")["generator"], half)


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
    for size, count in ((32, 1024), (128, 64), (1024, 1)):  # at once: as much memory
        assert len(train.chunks(SimpleNamespace(size=size), torch.arange(5000))[0]) == count


def test_colourfulness_of_two_colours():
    # Half (255, 0, 0), half (0, 0, 255): rg = 255, 0; yb = 127.5, -255. By hand: the deviation of
    # two values, by n - 1, is their distance / sqrt(2); means 127.5 and -63.75.
    image = torch.tensor([[255, 0], [0, 0], [0, 255]], dtype=torch.uint8).view(1, 3, 1, 2)
    expected = math.hypot(255, 382.5) / 2**0.5 + 0.3 * math.hypot(127.5, 63.75)
    assert train.colourfulness(image).item() == pytest.approx(expected)
    assert train.colourfulness(torch.full((1, 3, 4, 4), 90, dtype=torch.uint8)).item() == 0


def test_training_end_to_end(capsys):
    assert train_py("--data demo --size 32 --width 8 --batch-size 10 --sample-every 5 "
                    "--pretrain-epochs 8 --epochs 2") == 0
    rows, table = read_log(), capsys.readouterr().out.splitlines()[-7:]
    assert [row["phase"] for row in rows] == ["pretrain"] * 8 + ["wgan-gp"] * 2
    assert float(rows[7]["l1"]) < 0.8 * float(rows[0]["l1"])
    grey, mean, generator, real = [line[34:].replace("%", "").split() for line in table[2:6]]
    pretrained = max(float(row["val_psnr"]) for row in rows)
    assert pretrained > float(grey[0]) + 1  # validation against test: both of overlapping crops
    assert float(generator[2]) > 10 and real[:2] == ["100.00", "1.000"] and "demo" in table[6]
    assert grey[3] == real[3] == "0" and 0 < int(generator[3]) < 60  # worse than no colour
    assert "lambda_l1 300.0" in table[0] and Path("runs/test.txt").read_text().splitlines() == table
    assert sorted(os.listdir("runs")) == ["epoch-0005.png", "epoch-0010.png", "g.pt", "last.pt",
                                          "log.csv", "test.png", "test.txt"]
    for name in ("epoch-0010.png", "test.png"):
        with Image.open(f"runs/{name}") as picture:
            assert picture.size == (8 * 34 + 2, 3 * 34 + 2)
            grey, fake = (np.asarray(picture)[y : y + 32, 2:34].astype(int) for y in (2, 36))
        assert np.ptp(grey, axis=2).max() <= 1 < np.ptp(fake, axis=2).max()
    assert train_py("--eval runs/g.pt --data demo --out again") == 0
    assert capsys.readouterr().out.splitlines() == table  # the same file, the same figures
    assert Path("again/test.txt").read_text() == Path("runs/test.txt").read_text()
    assert sample.main(["--ckpt", "runs/g.pt", str(HERE / "in"), "out"]) == 0


def test_eval_warns_of_other_images_of_the_same_names(capsys, refused):
    folder = make_photos("photos")
    assert train_py(PRE.replace("demo", "photos --batch-size 4")) == 0
    for warned in (False, True):
        for i, path in enumerate(folder.rglob("*.png")):
            image = photo(seed=100 + i) if warned else Image.open(path)
            image.save(path, "JPEG", quality=90)  # at first as another decoder would see it
        capsys.readouterr()
        assert train_py("--eval runs/g.pt --data photos") == 0
        assert ("warning: these are not the images" in capsys.readouterr().out) == warned
    assert train_py("--eval runs/g.pt --data demo") == 0
    out = capsys.readouterr().out
    assert "warning" in out and "demo: the parts overlap" not in out  # it was not trained on them
    Path("file").touch()
    refused(train_py, "--eval runs/g.pt --data demo --out file", "cannot write file", status=1)


@pytest.mark.parametrize("term, weight, option", [  # in the only step of an epoch; by itself
    (math.nan, 1, "--batch-size 300"), (1, math.nan, "--batch-size 300"),
    (1, 1, "--batch-size 300 --lr 1e6")])  # what g.pt's float16 cannot hold
def test_divergence_is_said_and_nothing_is_saved(term, weight, option, refused, monkeypatch):
    command = f"{PRE} {option}"
    assert train_py(command) == 0
    Path("runs/test.txt").unlink()
    step = train.adversarial_step
    def diverging(run, L, ab):
        terms = step(run, L, ab)
        run.critic.layers[0].bias.data[0] *= weight
        return terms | {"penalty": terms["penalty"] * term}
    monkeypatch.setattr(train, "adversarial_step", diverging)
    refused(train_py, f"{command} --epochs 1 --resume", "epoch 2 diverged", "lower --lr", status=1)


def test_time_left_counts_both_phases(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(train, "live", lambda text: None)
    assert train_py(f"{TINY} --pretrain-epochs 2 --epochs 2 --batch-size 300") == 0
    left = [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()
            if line.startswith("epoch")]
    # ten seconds between two looks at the clock: an epoch of one step takes 30
    assert left == ["4 min left", "3 min left", "0 min left", "0 min left"]


# --- Checkpoints ---------------------------------------------------------------------------------

LONG = f"{TINY} --batch-size 100 --pretrain-epochs 2 --epochs"


def test_a_run_that_is_stopped_in_any_way_resumes_exactly(refused):
    assert train_py(f"{LONG} 8 --out whole") == 0
    for epochs in (0, 1):  # at the change of phase, and within the second
        assert train_py(f"{LONG} {epochs} --out stopped --resume") == 0
    refused(train_py, f"{LONG} 0 --out stopped --resume", "--epochs 0: the run in stopped has done")
    last, command = Path("stopped/last.pt"), f"{LONG} 8 --out stopped --resume"
    script = "import sys, train; train.SAVE_SECONDS = 0; sys.exit(train.main(sys.argv[1:]))"
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130),
                           (signal.SIGTERM, 130)):
        before = last.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, "-c", script, *command.split()],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and last.stat().st_mtime_ns == before:
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate()[1].strip()
        assert process.returncode == status and ("--resume goes on" in error) == (status == 130)
        assert len(error.splitlines()) <= 1
    assert train_py(command) == 0
    for name in ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler"):
        assert_identical(*[torch.load(f"{out}/last.pt")[name] for out in ("whole", "stopped")])
    assert_identical(*[torch.load(f"{out}/g.pt")["generator"] for out in ("whole", "stopped")])
    whole, stopped = (
        [{k: row[k] for k in row.keys() - {"images_per_s", "seconds"}} for row in read_log(out)]
        for out in ("whole", "stopped"))
    assert whole == stopped


def test_saves_are_seconds_apart_and_last_pt_is_written_last(monkeypatch):
    """A kill in between repeats epochs; the other way round it would lose them in log.csv."""
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(b.name) or replace(a, b))
    monkeypatch.setattr(train, "SAVE_SECONDS", 1000)
    assert train_py(f"{LONG} 2 --sample-every 1") == 0 and len(read_log()) == 4
    save = ["g.pt", "log.csv", "last.pt"]
    assert written == ["epoch-0001.png", *save, "epoch-0002.png", "epoch-0003.png",
                       "epoch-0004.png", *save, "test.txt", "test.png"]


def test_resume_refuses_other_options_before_it_reads_the_data(refused, monkeypatch):
    assert train_py(PRE) == 0
    assert torch.load("runs/last.pt")["options"]["amp"] == "off"  # not auto: devices differ
    monkeypatch.setattr(train, "Photos", None)
    for option in ("--seed 1", "--lambda-l1 10.0", "--pretrain-epochs 3", "--width 8", "--lr 0.1",
                   "--amp bf16"):
        refused(train_py, f"{PRE} --resume {option}", option, "the run in runs has")


def test_resume_takes_the_same_data_elsewhere_and_refuses_other_data(refused):
    command = "--size 32 --width 4 --batch-size 8 --pretrain-epochs 1"
    assert train_py(f"{command} --epochs 0 --data {make_photos('here')}") == 0
    command += f" --epochs 1 --resume --data {make_photos('there')}"
    assert train_py(command) == 0
    photo(seed=77).save("there/a/00.png")
    data.Photos("there", 32, 0)  # into the cache, which is no damage
    refused(train_py, command, "--data there: not the images")


def test_a_run_is_not_overwritten(refused, capsys, monkeypatch):
    assert train_py(f"{PRE} --resume") == 0
    assert "starting afresh" in capsys.readouterr().out
    for name in ("log.csv", "last.pt", "g.pt"):  # each alone marks the folder
        Path(name).mkdir()
        Path(name, name).touch()
        refused(train_py, f"{PRE} --out {name}", f"--out {name}: holds the {name}", "--resume")
    assert train_py(f"{PRE} --out log.csv --resume") == 0  # killed before its first save
    load_photos = train.load_photos
    def late(*args):
        Path("race").mkdir()  # of two that begin at once the later finds log.csv
        Path("race/log.csv").touch()
        return load_photos(*args)
    monkeypatch.setattr(train, "load_photos", late)
    assert train_py(f"{PRE} --out race") == 2 and os.listdir("race") == ["log.csv"]


@pytest.mark.parametrize("epochs", ["--pretrain-epochs 1 --epochs 0",
                                    "--pretrain-epochs 0 --epochs 1"])
def test_init_starts_both_phases_from_another_generator(epochs, refused):
    assert train_py(f"{PRE} --out first") == 0
    command = f"{TINY} --size 48 --batch-size 100 {epochs} --pretrain-lr 0 --lr 0 --init "
    assert train_py(f"{command} first/g.pt") == 0  # at another size; without a step, as they were
    first, last = torch.load("first/g.pt")["generator"], torch.load("runs/last.pt")
    for name, value in first.items():
        if name.endswith(("weight", "bias")):  # batch norm's statistics follow the pictures
            for state in (last["generator"], last["ema"]):
                assert torch.allclose(state[name], value.float(), rtol=1e-5), name  # EMA's rounding
    refused(train_py, f"{command} first/g.pt --width 8 --out wide",
            "--width 8: --init first/g.pt has width 4")
    assert train_py(f"{command} gone.pt --resume") == 0  # no longer read


def test_g_pt_is_plain_and_says_how_it_was_made():
    assert train_py(PRE) == 0
    generator, info = models.load_generator("runs/g.pt", CPU)
    assert (info["size"], info["epoch"], info["seed"]) == (32, 1, 0) and not generator.training
    assert info["options"]["width"] == 4 and len(info["test_means"]) == 64
    json.dumps(torch.load("runs/g.pt") | {"generator": None})  # plain types beside the weights


class Code:
    """Unpickling this would leave a file behind."""
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def bad_checkpoints():
    """The contents of files that are no g.pt, by kind."""
    state = models.UNet(4).state_dict()
    wide = torch.zeros(1, 1, 3, 3).expand(5000, -1, -1, -1)
    good = {"generator": state} | INFO
    kinds = {
        "code": Code(), "other": {"model": state}, "tensor": torch.zeros(3),
        "changed": good | {"generator": {f"new.{name}": value for name, value in state.items()}},
        "wide": good | {"generator": state | {"down1.0.weight": wide}},
        "nan": good | {"generator": state | {"head.bias": torch.full((2,), math.nan)}},
        "size": good | {"size": 10**9}, "seed": good | {"seed": "x"},
    }
    blobs = {"empty": b"", "text": b"hello", "missing": None}
    for kind, content in kinds.items():
        torch.save(content, buffer := io.BytesIO())
        blobs[kind] = buffer.getvalue()
    return blobs | {"cut": blobs["nan"][:-200]}


BAD = bad_checkpoints()


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints_are_one_line_and_run_no_code(kind, refused):
    if BAD[kind] is not None:
        Path("bad.pt").write_bytes(BAD[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(sample.main, ["--ckpt", "bad.pt", str(HERE / "in"), "out"], "bad.pt")
    refused(train_py, "--data demo --eval bad.pt", "bad.pt")
    refused(train_py, f"{TINY} --init bad.pt", "bad.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_damaged_last_pt_or_changed_networks_are_refused(refused, monkeypatch):
    assert train_py(PRE) == 0
    good, command = torch.load("runs/last.pt"), f"{PRE} --epochs 1 --resume"
    for kind in ("cut", "empty", "other", "code"):
        Path("runs/last.pt").write_bytes(BAD[kind])
        refused(train_py, command, "runs/last.pt")
    moments = good["optimizer_g"]["state"]
    other = good["optimizer_g"] | {"state": moments | {0: moments[0] | {"exp_avg": torch.ones(3)}}}
    damaged = [good | change for change in ({"epoch": "x"}, {"log": 3}, {"options": {}},
                                            {"optimizer_g": other})]
    damaged += [{k: v for k, v in good.items() if k != name} for name in good]
    for content in damaged:
        torch.save(content, "runs/last.pt")
        reason = "does not fit this code" if "optimizer_g" in content else "of another kind"
        refused(train_py, command, "runs/last.pt", reason)
    torch.save(good, "runs/last.pt")
    monkeypatch.setattr(train, "UNet", lambda width: models.UNet(width + 1))  # as coursework does
    refused(train_py, command, "runs/last.pt", "size mismatch", "another --out")


# --- Several processes ---------------------------------------------------------------------------

WORKER = """
import sys, torch, torch.distributed as dist, data, train

rows, batch = [], data.Photos.batch

def spy(photos, chosen, crop=False):
    if crop:
        rows.append((chosen.tolist(), torch.initial_seed()))
    return batch(photos, chosen, crop)

class Run(train.Run):
    def check_finite(self, means, epoch):
        ranks = torch.full((2,), float(dist.get_rank()))
        train.average([ranks])
        networks = (self.generator, self.critic, self.ema)
        weights = [list(network.parameters()) for network in networks]
        torch.save([weights, means, ranks, rows], f"{epoch}-{dist.get_rank()}.pt")
        rows.clear()
        super().check_finite(means, epoch)

data.Photos.batch, train.Run = spy, Run
sys.exit(train.main(sys.argv[1:]))
"""


def torchrun(script, options):
    Path("worker.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "worker.py", *options.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_processes_share_each_batch_and_stay_bit_identical():
    result = torchrun(WORKER, f"{TINY} --pretrain-epochs 1 --epochs 1")
    assert result.returncode == 0, result.stderr
    for epoch in range(2):
        (*a, ranks, rows_a), (*b, _, rows_b) = (torch.load(f"{epoch}-{rank}.pt") for rank in "01")
        assert_identical(a, b)
        assert ranks.tolist() == [0.5, 0.5]  # the mean, not the sum
        rng = np.random.default_rng([0, epoch])  # as with one process
        order = data.Photos("demo", 32, 0).train[rng.permutation(300)].tolist()
        assert len(rows_a) == len(rows_b) == 9
        for i, ((chosen_a, seed_a), (chosen_b, seed_b)) in enumerate(zip(rows_a, rows_b)):
            assert sorted(chosen_a + chosen_b) == sorted(order[32 * i : 32 * i + 32])
            assert len(chosen_a) == 16 and seed_a != seed_b  # other crops and mixes
    assert result.stdout.count("epoch 2/2") == 1 and len(read_log()) == 2  # rank 0 alone
    assert torch.load("runs/last.pt")["options"]["processes"] == 2


@pytest.mark.parametrize("folder, message", [
    ("photos", "--data photos, --out runs: not the same images"),
    ("none", "--data none: no folder")])
def test_processes_that_see_other_images_or_none_are_refused(folder, message):
    for rank in "01":
        make_photos(f"{rank}/photos", 20)
    Path("1/photos/a/00.png").unlink()
    script = ("import os, sys, train; os.chdir(os.environ['RANK']); "
              "sys.exit(train.main(sys.argv[1:]))")
    result = torchrun(script, f"--data {folder} --size 32 --width 4 --batch-size 4")
    assert result.returncode and message in result.stderr
    assert 'train.py", line' not in result.stderr  # no traceback but torchrun's own


def test_batches_divide_among_processes(refused, monkeypatch):
    monkeypatch.setattr(train, "join_processes",
                        lambda args: setattr(args, "processes", 3) or (CPU, 0))
    refused(train_py, TINY, "--batch-size 32: not a multiple of 3 processes")


@pytest.mark.parametrize("name, value", [("RANK", "1"), ("WORLD_SIZE", "2"), ("WORLD_SIZE", "abc")])
def test_variables_without_torchrun_change_nothing(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert train_py(PRE) == 0 and Path("runs/g.pt").exists()


# --- Sampling ------------------------------------------------------------------------------------

def fixed(slope, offset):
    """A generator of known output: ab is an affine function of L."""
    generator = nn.Sequential(OrderedDict(head=nn.Conv2d(1, 2, 1)))
    generator.head.weight.data[:, 0, 0, 0] = torch.tensor(slope)
    generator.head.bias.data[:] = torch.tensor(offset)
    return generator


@pytest.mark.parametrize("slope, offset", [
    ((0.0, 0.0), (0.2, 0.0)), ((0.0, 0.0), (0.0, 0.2)), ((0.0, 0.0), (-0.2, 0.1)),
    ((0.3, 0.0), (0.0, 0.0))])
def test_colour_is_what_and_where_the_network_says(slope, offset):
    ramp = Image.fromarray(np.tile(np.linspace(100, 180, 64).astype(np.uint8), (48, 1)))
    for image in (ramp, ramp.convert("RGB")):
        made, psnr = sample.colorize(fixed(slope, offset), image, 64)
        lab = rgb2lab(np.asarray(made))
        expected = ((lab[..., :1] / 50 - 1) * slope + offset) * 110
        assert psnr is None and made.size == (64, 48)
        limit = 2 if any(slope) else 1  # bicubic edges; 8 bits
        assert np.abs(lab[..., 1:] - expected).max() < limit


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_strips_have_no_seams(mode, ckpt, monkeypatch):
    generator, _ = models.load_generator(ckpt, CPU)
    image = photo((90, 301), mode=mode)
    whole, whole_psnr = sample.colorize(generator, image, 32)
    monkeypatch.setattr(sample, "STRIP", 90 * 7)
    strips, strips_psnr = sample.colorize(generator, image, 32)
    assert np.array_equal(whole, strips) and whole_psnr == pytest.approx(strips_psnr)


def test_toned_prints_are_black_and_white():
    sepia, cyan = ((30, 15, 5), (255, 240, 200)), ((10, 10, 40), (230, 240, 255))
    for dark, light in (sepia, cyan, ((0, 0, 0), (255, 255, 255))):
        toned = saved(ImageOps.colorize(GREY, dark, light), "JPEG", quality=75)
        toned = Image.open(io.BytesIO(toned))
        assert sample.colorize(fixed((0.0, 0.0), (0.0, 0.0)), toned, 32)[1] is None
    assert sample.colorize(fixed((0.0, 0.0), (0.0, 0.0)), COLOUR, 32)[1] is not None


def test_a_folder_is_mirrored_measured_and_shown(sample_py, capsys):
    put(COLOUR, "in/a.JPG", "in/sub/a.jpg", "elsewhere/linked.png")
    put(GREY, "in/sub/deep/grey.png")
    Path("in/link.png").symlink_to(Path("elsewhere/linked.png").resolve())
    Path("in/folder").symlink_to(Path("elsewhere").resolve())
    for name in ("notes.txt", "b.heic", "c.HEIC", "README", "._a.jpg", ".DS_Store"):
        Path("in", name).write_text("left alone")
    before = tree("in")
    for _ in range(2):  # an earlier run's outputs are replaced
        assert sample_py("in out") == 0
        assert sorted(tree("out")) == ["out/a.JPG", "out/grid.png", "out/link.png", "out/sub/a.jpg",
                                       "out/sub/deep/grey.png"]
        assert tree("in") == before
        out = capsys.readouterr().out
        assert out.count(" dB\n") == 3 and "4 colorized" in out and "3 that had colour" in out
        assert "0 failed; no pictures: 2 .heic, 1 .txt, 1 no suffix" in out
        assert out.splitlines()[-1] == "the results are in out, 4 of them in out/grid.png"
    best = Image.open(io.BytesIO(saved(COLOUR, "JPEG", quality=95, subsampling=0)))
    with Image.open("out/a.JPG") as image, Image.open("in/a.JPG") as real:
        assert image.quantization == best.quantization and image.layer == best.layer
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


def test_grid_pages(sample_py, capsys):
    for i in range(11):
        image = GREY if i else GREY.resize((1, 2000))  # a line: a side of it would be 0
        put(image, f"in/{i:02}-{'ü☃' * 20}.png")
    assert sample_py("in out --grid 10") == 0
    sizes = [Image.open(f"out/{name}").size for name in ("grid.png", "grid-2.png")]
    assert sizes == [(8 * 258, 2 * 258 + 24), (2 * 258, 2 * 258 + 24)]  # grey: no third row
    assert "10 of them in out/grid.png to grid-2.png" in capsys.readouterr().out
    assert len(tree("out")) == 13
    for name in ("Blüte", "Blute", "Blte"):
        sample.draw_grid([(name, [GREY])], Path(name))  # the font has ASCII alone
    accented, plain, without = (Path(name).read_bytes() for name in ("Blüte", "Blute", "Blte"))
    assert accented == plain != without


def test_no_two_inputs_share_an_output(sample_py):
    put(GREY, "in/a.gif", "in/a.gif.png", "in/a.png", "in/grid.png", "in/grid-2.png/a.png")
    assert sample_py("in out") == 0
    assert sorted(tree("out")) == [
        "out/a.gif.png", "out/a.gif.png.png", "out/a.png", "out/grid-2.png/a.png",
        "out/grid-3.png", "out/grid.png"]


@pytest.mark.parametrize("name", ["b.gif.png", "grid-2.png"])
def test_a_linked_input_is_never_overwritten(name, sample_py, refused):
    put(GREY, "in/b.gif", "in/grid.png", f"out/{name}")
    Path("in/link.png").symlink_to(Path("out", name).resolve())
    refused(sample_py, "in out", f"would overwrite the input out/{name}")
    put(GREY, "in/a.png", "far/b.png")
    os.link("in/a.png", "far/a.png")  # one file of two names, as where a disk is mounted twice
    refused(sample_py, "in far", "would overwrite the input far/a.png")
    Path("other").mkdir()
    Path("other/a").symlink_to(Path("in").resolve())
    put(GREY, "in/a/c.png")
    refused(sample_py, "in other", "other/a lies in the input folder")


def test_skip_existing_goes_on_after_ctrl_c(sample_py, capsys, monkeypatch):
    make_photos("in", 6)
    GREY.save("in/z.gif")  # goes to z.gif.png
    seen, colorize_file = [], sample.colorize_file
    def interrupted(*args):
        seen.append(args)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return colorize_file(*args)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "colorize_file", interrupted)
        assert sample_py("in out") == 130
    out, err = capsys.readouterr()
    assert "4 colorized" in out and "out/grid.png" in out
    assert err == "stopped after 4 of 7; --skip-existing goes on\n"
    before = tree("out")
    assert len(before) == 5  # the picture in hand was finished; and the grid
    for counts in (("3 colorized", "0 failed, 4 done before", "3 of them in out/grid-2.png"),
                   ("0 colorized, 0 failed, 7 done before",)):
        assert sample_py("in out --skip-existing") == 0
        out = capsys.readouterr().out
        assert all(count in out for count in counts)
        assert before.items() <= tree("out").items()
    assert sample_py("in out") == 0
    assert "7 colorized" in capsys.readouterr().out


def test_broken_files_and_folders_are_named_and_the_others_colorized(sample_py, capsys):
    spoil(make_photos("in", 3))
    assert sample_py("in out") == 1
    out, err = capsys.readouterr()
    names = [line.split(": not ")[0] for line in err.splitlines()]
    assert names[0].startswith("in/ddd") and names[1:] == [
        "in/\\x1b[31m\\nred.png", "in/cut.png", "in/empty.png", "in/gone.png", "in/huge.png"]
    assert "3 colorized" in out and "6 failed" in out and len(tree("out")) == 4


def test_no_memory_for_a_picture_is_said_with_its_name(sample_py, refused, monkeypatch):
    def failing(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(sample, "colorize", failing)
    COLOUR.save("a.png")
    refused(sample_py, "a.png out", "a.png: not colorized: CUDA out of memory", status=1)


def test_odd_names_and_folders(sample_py, capsys, refused):
    for name in ("n" * 246 + ".png", os.fsdecode(b"caf\xe9.png"), "a b: ü.png"):
        put(COLOUR, Path("in", name))
    assert sample_py("in out --grid 0") == 0
    out = capsys.readouterr().out
    assert "caf\\udce9.png: " in out and out.count(" dB\n") == 3 and len(tree("out")) == 3
    refused(sample_py, f"in/{'n' * 246}.png /proc/none", "/proc/none", status=1)
    Path("empty").mkdir()
    refused(sample_py, "empty none", "no file with the suffix", status=1)


@pytest.mark.parametrize("encoding, expected", [
    ("ascii", "\\xfc.jpg \\u2603\n"), ("cp1252", "ü.jpg \\u2603\n")])
def test_names_beyond_the_terminals_encoding_are_escaped(encoding, expected):
    file = io.TextIOWrapper(buffer := io.BytesIO(), encoding=encoding)
    data.say("ü.jpg ☃", file)
    assert buffer.getvalue().decode(encoding) == expected


@pytest.mark.parametrize("shell, status", [("2>&-", 1), ("| true", 0), (">/dev/full", 1)])
def test_closed_and_full_outputs_make_no_traceback(shell, status, ckpt):
    put(COLOUR, "in/a.png")
    Path("in/b.png").touch()  # broken
    command = f"{sys.executable} {HERE / 'sample.py'} --ckpt {ckpt} in out {shell}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == status and "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_a_closed_terminal_ends_sampling_as_ctrl_c_does(ckpt):
    make_photos("in", 200)
    process = subprocess.Popen([sys.executable, HERE / "sample.py", "--ckpt", ckpt, "in", "out"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not Path("out").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    error = process.communicate()[1]
    assert process.returncode == 130 and "--skip-existing goes on" in error
    assert not list(Path("out").rglob(".*")) and "Traceback" not in error


def mutate(blob, others, rng):
    """Break a file: flip bits, cut it, or splice it with another."""
    blob, place, kind = bytearray(blob), rng.randrange(len(blob)), rng.randrange(3)
    if kind == 0:
        for _ in range(rng.choice((1, 4, 30))):
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    else:
        other = rng.choice(others)
        blob[place:] = other[rng.randrange(len(other)) :] if kind == 1 else b""
    return bytes(blob)


def test_mutated_files_are_colorized_or_named(sample_py, capsys):
    """MUTATIONS files (300): each is written or named, within bounds of time and memory."""
    rng, count = random.Random(0), int(os.environ.get("MUTATIONS", 300))
    seeds = [(format, saved(photo((60, 45)), format)) for format in (
        "png", "jpeg", "tiff", "bmp", "webp", "gif")]
    Path("in").mkdir()
    for i in range(count):
        suffix, blob = rng.choice(seeds)
        blob = mutate(blob, [other for _, other in seeds], rng)
        Path(f"in/{i:05}.{suffix}").write_bytes(blob)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, lambda *_: pytest.exit("a broken file hangs"))
    signal.alarm(60 + count // 10)
    try:
        assert sample_py("in out --grid 0") == 1
    finally:
        signal.alarm(0)
    named = {line.split(":")[0] for line in capsys.readouterr().err.splitlines()}
    written = {f"in/{p.name}".replace(".gif.png", ".gif") for p in Path("out").iterdir()}
    assert {str(p) for p in Path("in").iterdir()} == named | written and not named & written
    assert min(len(named), len(written)) > count / 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert peak < 2**20  # KiB: 1 GiB


# --- Command-line mistakes -----------------------------------------------------------------------

@pytest.mark.parametrize("command", (
    "--size 100, --size 16, --size 1000000, --size big, --width 0, --width 10000, --batch-size 0, "
    f"--batch-size 2.5, --batch-size {'9' * 401}, {TINY} --batch-size 1000000, --epochs -1, "
    "--pretrain-epochs -1, --pretrain-epochs 0 --epochs 0, --critic-steps 0, --generator-steps 0, "
    "--lambda-l1 -1, --lambda-gp nan, --lr -1, --lr inf, --pretrain-lr fast, --ema 1.5, --amp fp8, "
    "--device gpu, --device hpu, --device meta, --device cuda:99, --seed -1, --sample-every 0, "
    f"--data file, --data absent, {TINY} --out file/x, {TINY} --out file, --frobnicate, --epochs, "
    "--data photos --out photos/runs, --data photos --eval g.pt --out photos/runs").split(", "))
def test_train_mistakes_are_one_line_that_names_the_last_option(command, refused):
    Path("photos").mkdir()
    Path("file").touch()
    refused(train_py, command, [word for word in command.split() if word.startswith("--")][-1])


@pytest.mark.parametrize("command, named", [
    ("missing out", "missing"), ("in in", "out in"), ("in in/out", "in/out"),
    ("in/a/00.png in/a", "overwrite"), ("in file", "out file"), ("in/a/00.png b.jpg", "out b.jpg"),
    ("in", "out"), ("in out --device gpu", "--device"), ("in out --size 3", "--size"),
    ("in out --grid -1", "--grid")])
def test_sample_mistakes_are_one_line(command, named, sample_py, refused):
    make_photos("in", 2)
    Path("file").touch()
    refused(sample_py, command, named)


@pytest.mark.parametrize("error, status, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "lower --batch-size"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_out_of_memory_and_ctrl_c_are_one_line(error, status, said, refused):
    def work():
        raise error
    refused(lambda work: data.run_command("train.py", work), work, said, status=status)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        data.run_command("train.py", lambda: torch.zeros(3).view(2))


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

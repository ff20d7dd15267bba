"""Tests of the colorizer: CPU, no network, a minute or two on two cores.

    python -m pytest
    MUTATIONS=10000 python -m pytest -k mutated      # the full count of broken pictures
"""
import csv
import hashlib
import io
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from skimage.color import lab2rgb, rgb2lab
from torch import nn

import data
import models
import sample
import train

TINY = "--data demo --size 32 --width 4 --device cpu".split()
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Every test runs in a folder of its own: nothing is left in the tree."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))


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


# ---------------------------------------------------------------------------------------------
# Colour

def grid(low, high, n):
    axes = [np.linspace(a, b, n) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*axes), -1).reshape(1, n * n, n, 3)


def to_torch(image):
    return torch.from_numpy(image).permute(0, 3, 1, 2).float()


def test_rgb_to_lab_is_scikit_images():
    rgb = grid((0, 0, 0), (1, 1, 1), 41)
    lab = data.rgb_to_lab(to_torch(rgb)).permute(0, 2, 3, 1).numpy()
    assert np.abs(lab - rgb2lab(rgb)).max() < 1e-3  # float32, and scikit-image's step at 0.008856


@pytest.mark.filterwarnings("ignore:.*negative Z")
def test_lab_to_rgb_is_scikit_images_also_outside_the_gamut():
    lab = grid((0, -128, -128), (100, 127, 127), 41)
    rgb = data.lab_to_rgb(to_torch(lab)).permute(0, 2, 3, 1).numpy()
    assert np.abs(rgb - lab2rgb(lab)).max() < 1e-4  # float32
    assert rgb.min() == 0 and rgb.max() == 1


def test_8_bit_colours_survive_the_round_trip():
    rgb = torch.cartesian_prod(*[torch.arange(0, 256, 5)] * 3).T.reshape(1, 3, -1, 1)
    back = data.lab_to_rgb(data.denormalize(*data.normalize(data.rgb_to_lab(rgb / 255))))
    assert torch.equal((back * 255).round().long(), rgb)


def test_colour_is_differentiable():
    rgb = torch.rand(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(data.rgb_to_lab, rgb)
    assert torch.autograd.gradcheck(lambda x: data.lab_to_rgb(data.rgb_to_lab(x) * 0.9 + 3), rgb)


@pytest.mark.parametrize("convert, values", [
    (data.rgb_to_lab, [0.0, 1.0]), (data.lab_to_rgb, [-500.0, 0.0, 100.0, 500.0])])
def test_colour_and_its_gradient_are_finite_at_the_extremes(convert, values):
    x = torch.cartesian_prod(*[torch.tensor(values)] * 3).T.reshape(1, 3, -1, 1).requires_grad_()
    y = convert(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------
# Data

def test_split_is_70_15_15_and_depends_on_the_seed_alone():
    a = data.Photos(make_photos("here", 40), 32, seed=1)
    b = data.Photos(make_photos("there/deeper", 40), 32, seed=1)
    parts = [a.train.tolist(), a.val.tolist(), a.test.tolist()]
    assert [len(p) for p in parts] == [28, 6, 6] and sorted(sum(parts, [])) == list(range(40))
    assert parts == [b.train.tolist(), b.val.tolist(), b.test.tolist()]
    assert (a.test_digest, a.contents) == (b.test_digest, b.contents)
    c = data.Photos("here", 32, seed=2)
    assert c.test_digest != a.test_digest and c.contents == a.contents


def test_identical_images_fall_into_the_same_part():
    make_photos("photos", 30)
    for i in range(20):  # by chance alone, 20 pairs would all stay together once in 10^6 runs
        original = Path(f"photos/{'ab'[i % 2]}/{i:02}.png")
        Path(f"photos/copy-{i:02}.png").write_bytes(original.read_bytes())
    photos = data.Photos("photos", 32, seed=0)
    names = [p.as_posix() for p in data.find_images("photos")]
    part = {names[row]: i for i, rows in enumerate((photos.train, photos.val, photos.test))
            for row in rows.tolist()}
    assert len(part) == 50
    assert all(part[f"copy-{i:02}.png"] == part[f"{'ab'[i % 2]}/{i:02}.png"] for i in range(20))


def test_cache_serves_until_the_data_change(monkeypatch, capsys):
    folder, decoded, decode = make_photos("photos"), [], data.decode
    monkeypatch.setattr(data, "decode", lambda *args: decoded.append(args) or decode(*args))
    first = data.Photos(folder, 32, 0)
    again = data.Photos(folder, 32, 0)
    assert len(decoded) == 20 and torch.equal(first.images, again.images)
    photo(seed=99).save(folder / "a" / "00.png")  # changed
    assert data.Photos(folder, 32, 0).contents != first.contents and len(decoded) == 40
    photo(seed=98).save(folder / "new.png")  # added
    assert len(data.Photos(folder, 32, 0).images) == 21 and len(decoded) == 61
    (folder / "a" / "02.png").unlink()  # deleted
    assert len(data.Photos(folder, 32, 0).images) == 20 and len(decoded) == 81
    assert len(tree("cache")) == 4  # one whole file each, no remains
    capsys.readouterr()


def test_images_are_memory_mapped_and_never_written():
    images = data.Photos(make_photos("photos"), 32, 0).images
    before = tree("cache")
    images[:] = 0
    assert tree("cache") == before


def test_unreadable_images_are_named_and_left_out(capsys):
    folder = make_photos("photos")
    (folder / "cut.png").write_bytes((folder / "a" / "00.png").read_bytes()[:100])
    (folder / "text.jpg").write_text("no picture")
    for _ in range(2):  # also when the cache is there
        photos = data.Photos(folder, 32, 0)
        assert sum(map(len, (photos.train, photos.val, photos.test))) == 20
        out = capsys.readouterr().out
        assert "2 of 22 images left out, unreadable or all black: cut.png, text.jpg" in out


@pytest.mark.parametrize("count", [0, 9])
def test_too_few_images_are_refused(count):
    Path("photos").mkdir()
    with pytest.raises(data.UsageError, match=f"--data photos: {count} readable images"):
        data.Photos(make_photos("photos", count), 32, 0)


def test_images_that_are_all_the_same_are_refused():
    Path("photos").mkdir()
    for i in range(12):
        photo().save(f"photos/{i}.png")
    with pytest.raises(data.UsageError, match="too many identical images"):
        data.Photos("photos", 32, 0)


def test_decode_reads_orientation_16_bit_and_grey_right():
    image, exif = photo((64, 32)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save("turned.png", exif=exif)
    image.rotate(-90, expand=True).save("upright.png")
    assert np.array_equal(data.decode("turned.png", 32), data.decode("upright.png", 32))
    grey = photo((32, 32), mode="L")
    grey.save("grey.png")
    for mode in ("<u2", ">u2"):
        Image.fromarray((np.asarray(grey).astype(int) * 257).astype(mode)).save("deep.tif")
        assert np.array_equal(data.decode("deep.tif", 32), data.decode("grey.png", 32))
    assert np.array_equal(data.decode("grey.png", 32)[..., 0], np.asarray(grey))


def test_a_download_appears_whole_or_not_at_all(monkeypatch):
    def broken(self, root, download):
        make_photos(root / "flowers-102" / "jpg", 3)
        raise RuntimeError("no route to host")
    def whole(self, root, download):
        make_photos(root / "flowers-102" / "jpg")
    monkeypatch.setattr(data.Flowers102, "__init__", broken)
    with pytest.raises(data.UsageError, match="by hand.*--data demo"):
        data.Photos("flowers", 32, 0)
    assert not Path("flowers").exists() and Path("flowers.part").exists()
    monkeypatch.setattr(data.Flowers102, "__init__", whole)
    assert len(data.Photos("flowers", 32, 0).images) == 20 and not Path("flowers.part").exists()


def test_each_image_gets_its_own_crop_mirrored_or_not():
    torch.manual_seed(0)
    ramp = (torch.arange(96) + 0.5) / 96  # a picture of its own coordinates
    x, y = ramp.expand(96, 96), ramp[:, None].expand(96, 96)
    crops = data.random_crops(torch.stack([x, y, x * 0]).expand(4000, -1, -1, -1), 64)
    assert crops.shape == (4000, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 1
    first, last = crops[:, :2, 0, 0], crops[:, :2, -1, -1]  # centres of the corner pixels
    width, height = ((last - first) * 64 / 63).T
    mirrored = width < 0
    assert 0.45 < mirrored.float().mean() < 0.55 and not (height < 0).any()  # 6 standard deviations
    width, tolerance = width.abs(), 1e-4
    for side in (width, height):  # never enlarged: 64 pixels of at least two thirds of 96
        assert 2 / 3 - tolerance < side.min() < 0.68 and 0.99 < side.max() < 1 + tolerance
    ratio, area = width / height, width * height
    assert 0.9 - tolerance < ratio.min() < 0.91 and 1.09 < ratio.max() < 1.1 + tolerance
    assert area.mean() == pytest.approx((4 / 9 + 1) / 2, abs=0.02)  # uniform between the squares
    left = torch.minimum(first[:, 0], last[:, 0]) - width / 128
    small = width < 0.9
    assert (left / (1 - width))[small].mean() == pytest.approx(0.5, abs=0.03)  # anywhere inside
    assert left.min() > -tolerance and (left + width).max() < 1 + tolerance
    spread = (left / (1 - width))[small].std()
    assert spread == pytest.approx(12 ** -0.5, abs=0.02)  # uniform


def test_batches_are_the_whole_image_or_crops_of_it():
    photos = data.Photos(make_photos("photos"), 32, 0)
    assert photos.images.shape == (20, 48, 48, 3)
    L, ab = photos.batch(photos.val, "cpu")
    assert L.shape == (3, 1, 32, 32) and ab.shape == (3, 2, 32, 32)
    images = [Image.fromarray(photos.images[row].numpy()) for row in photos.val]
    small = np.stack([image.resize((32, 32), Image.Resampling.BICUBIC) for image in images])
    lab = rgb2lab(small)
    assert np.abs((L[:, 0].numpy() + 1) * 50 - lab[..., 0]).max() < 0.7  # Pillow rounds to 8 bits
    assert np.abs(ab.permute(0, 2, 3, 1).numpy() * 110 - lab[..., 1:]).mean() < 0.5
    torch.manual_seed(0)
    crops = photos.batch(photos.val[[0, 0]], "cpu", crop=True)
    assert not torch.equal(crops[0][0], crops[0][1]) and crops[1].shape == (2, 2, 32, 32)
    assert L.abs().max() <= 1 and ab.abs().max() <= 1


# ---------------------------------------------------------------------------------------------
# Networks

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


def test_critic_takes_sides_from_32():
    assert models.PatchCritic(4)(torch.rand(1, 3, 32, 32)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 32"):
        models.PatchCritic(4)(torch.rand(1, 3, 31, 32))


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


def test_critic_judges_each_image_alone():
    torch.manual_seed(0)
    critic, lab = models.PatchCritic(4), torch.rand(3, 3, 32, 32)
    assert torch.allclose(critic(lab)[:1], critic(lab[:1]), atol=1e-6)  # other order of summation


# ---------------------------------------------------------------------------------------------
# Losses

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


def test_penalty_is_taken_between_real_and_fake():
    seen = []
    def critic(lab):
        seen.append(lab)
        return lab.sum((1, 2, 3), keepdim=True)
    L, real, fake = torch.rand(50, 1, 8, 8), torch.ones(50, 2, 8, 8), torch.zeros(50, 2, 8, 8)
    train.gradient_penalty(critic, L, real, fake)
    mix = seen[0][:, 1:].flatten(1)
    assert torch.equal(seen[0][:, :1], L) and (mix.amax(1) - mix.amin(1)).max() == 0  # one an image
    assert mix.min() >= 0 and mix.max() <= 1 and mix[:, 0].std() > 0.2  # uniform: 0.29


def test_losses_have_the_papers_signs():
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])
    assert train.critic_loss(real, fake) == 1.5 - 4  # falls as real scores above colorized
    assert train.generator_loss(torch.tensor(0.1), fake, 100.0) == pytest.approx(100 * 0.1 - 1.5)
    L, ab = torch.ones(2, 1, 4, 4), torch.ones(2, 2, 4, 4)
    scores = train.score(lambda lab: lab.mean(1, keepdim=True), L, ab)
    assert torch.equal(scores, torch.ones(2))


# ---------------------------------------------------------------------------------------------
# Training

def tiny_run(*options):
    return train.Run(train.parse_args([*TINY, *options]), torch.device("cpu"))


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
        assert all(p.grad is None for p in run.generator.parameters()) or network is run.generator
        steps.append(type(network).__name__)
    monkeypatch.setattr(train, "step", spy)
    run.generator.register_forward_hook(lambda *_: forwards.append(1))
    terms = train.adversarial_step(run, torch.rand(4, 1, 32, 32), torch.rand(4, 2, 32, 32))
    assert steps == ["PatchCritic", "UNet", "UNet"] and len(forwards) == 2 and len(terms) == 4


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


def read_log(out):
    with open(Path(out, "log.csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_training_end_to_end(capsys):
    command = "--data demo --size 32 --width 8 --batch-size 10".split()
    command += ["--pretrain-epochs", "8", "--epochs", "2"]
    assert train.main([*command, "--sample-every", "5"]) == 0
    rows, table = read_log("runs"), capsys.readouterr().out.splitlines()[-6:]
    assert float(rows[7]["l1"]) < 0.8 * float(rows[0]["l1"])
    grey, mean, generator, real = [[float(x) for x in line[34:].split()] for line in table[1:5]]
    pretrained = max(float(row["val_psnr"]) for row in rows)
    assert pretrained > grey[0] + 1  # validation against test: both of overlapping crops
    assert generator[2] > 10 and real[:2] == [100.0, 1.0] and "demo" in table[5]
    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "epoch-0005.png", "epoch-0010.png", "g.pt", "last.pt", "log.csv"]
    with Image.open("runs/epoch-0010.png") as picture:
        assert picture.size == (8 * 34 + 2, 3 * 34 + 2)
    assert [row["phase"] for row in rows] == ["pretrain"] * 8 + ["wgan-gp"] * 2
    assert train.main(["--eval", "runs/g.pt", "--data", "demo"]) == 0
    assert capsys.readouterr().out.splitlines() == table  # the same file, the same figures
    assert sample.main(["--ckpt", "runs/g.pt", str(HERE / "in"), "out"]) == 0


def test_eval_warns_of_other_data(capsys):
    train.main([*TINY, "--pretrain-epochs", "1", "--epochs", "0"])
    capsys.readouterr()
    train.main(["--eval", "runs/g.pt", "--data", str(make_photos("photos"))])
    assert "warning: these are not the images" in capsys.readouterr().out


def test_divergence_is_named_and_nothing_is_saved(capsys, monkeypatch):
    command = [*TINY, "--pretrain-epochs", "1", "--resume"]
    assert train.main([*command, "--epochs", "0"]) == 0
    before = tree("runs")
    real_step = train.adversarial_step
    def diverging(run, L, ab, calls=[]):
        calls.append(1)
        l1, *others = real_step(run, L, ab)
        return [l1, *others[:-1], others[-1] * (math.nan if len(calls) == 3 else 1)]
    monkeypatch.setattr(train, "adversarial_step", diverging)
    assert train.main([*command, "--epochs", "1"]) == 1
    assert "epoch 2, step 3 of 9: penalty is nan" in capsys.readouterr().err
    assert tree("runs") == before


def test_an_absurd_learning_rate_stops_the_run(capsys):
    assert train.main([*TINY, "--pretrain-epochs", "0", "--epochs", "1", "--lr", "1e30"]) == 1
    assert "step" in capsys.readouterr().err and not Path("runs/last.pt").exists()


# ---------------------------------------------------------------------------------------------
# Checkpoints

LONG = [*TINY, "--pretrain-epochs", "2", "--epochs", "2", "--out"]


def assert_same_run(a, b):
    last = [torch.load(Path(out, "last.pt"), weights_only=True) for out in (a, b)]
    logs = [[{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")}
             for row in read_log(out)] for out in (a, b)]
    assert logs[0] == logs[1]
    for name in train.Run.STATEFUL:
        assert same(last[0][name], last[1][name]), name


def test_resume_is_exact_and_so_is_a_second_run():
    assert train.main([*LONG, "whole"]) == 0
    for epochs in "012":  # stopped at the change of phase, and within the second
        assert train.main([*LONG, "parts", "--epochs", epochs, "--resume"]) == 0
    assert_same_run("whole", "parts")
    assert same(torch.load("whole/g.pt", weights_only=True)["generator"],
                torch.load("parts/g.pt", weights_only=True)["generator"])


def test_a_killed_and_an_interrupted_run_resume_exactly():
    options = ["--epochs", "8", "--resume"]
    assert train.main([*LONG, "whole", *options]) == 0
    last = Path("stopped/last.pt")
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = last.exists() and last.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, HERE / "train.py", *LONG, "stopped", *options],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not last.exists() or last.stat().st_mtime_ns == before:
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate()[1].strip()
        assert process.returncode == status and ("--resume goes on" in error) == (status == 130)
        assert len(error.splitlines()) <= 1
    assert train.main([*LONG, "stopped", *options]) == 0
    assert_same_run("whole", "stopped")


@pytest.mark.parametrize("option, value", [
    ("--seed", "1"), ("--lambda-l1", "10"), ("--pretrain-epochs", "3"), ("--width", "8"),
    ("--lr", "0.1")])
def test_resume_refuses_other_options(option, value, capsys):
    command = [*TINY, "--pretrain-epochs", "1", "--epochs", "0"]
    assert train.main(command) == 0
    before = tree()
    assert train.main([*command, "--resume", option, value]) == 2
    error = capsys.readouterr().err
    assert option in error and value in error and "the run in runs has" in error
    assert tree() == before


def test_resume_refuses_fewer_epochs_than_were_done(capsys):
    command = [*TINY, "--pretrain-epochs", "1", "--resume", "--epochs"]
    assert train.main([*command, "1"]) == 0
    assert train.main([*command, "0"]) == 2
    assert "--epochs 0: the run in runs has done 1" in capsys.readouterr().err


def test_resume_takes_the_same_data_elsewhere_and_refuses_other_data(capsys):
    command = "--size 32 --width 4 --batch-size 8 --pretrain-epochs 1 --epochs 0 --data".split()
    assert train.main([*command, str(make_photos("here"))]) == 0
    assert train.main([*command, str(make_photos("there")), "--resume", "--epochs", "1"]) == 0
    photo(seed=77).save("there/a/00.png")
    assert train.main([*command, "there", "--resume"]) == 2
    assert "--data there: not the images" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_resume_without_one_says_so(capsys):
    command = [*TINY, "--pretrain-epochs", "1", "--epochs", "0"]
    assert train.main([*command, "--resume"]) == 0
    assert "starting afresh" in capsys.readouterr().out
    assert train.main(command) == 2
    assert "--out runs: holds a run" in capsys.readouterr().err


def test_g_pt_is_plain_and_rebuilds_the_ema():
    train.main([*TINY, "--pretrain-epochs", "1", "--epochs", "0"])
    generator, info = models.load_generator("runs/g.pt", "cpu")
    assert info["size"] == 32 and info["epoch"] == 1 and not generator.training
    json.dumps(info)  # plain types only
    ema = models.UNet(4)
    ema.load_state_dict(torch.load("runs/last.pt", weights_only=True)["ema"])
    L = torch.rand(2, 1, 32, 32)
    assert torch.allclose(generator(L), ema.eval()(L), atol=5e-3)  # float16 has 11 bits


@pytest.mark.parametrize("pretrain", ["0", "1"])
def test_init_starts_both_phases_from_another_generator(pretrain, capsys):
    train.main([*TINY, "--pretrain-epochs", "1", "--epochs", "0", "--out", "first"])
    command = "--data demo --size 48 --width 4 --device cpu --init first/g.pt".split()
    still = ["--pretrain-epochs", pretrain, "--epochs", str(1 - int(pretrain)),
             "--pretrain-lr", "0", "--lr", "0"]
    assert train.main([*command, *still]) == 0  # at another size; with no step, the same weights
    states = [torch.load(f"{out}/g.pt", weights_only=True)["generator"] for out in ("first", "runs")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0] if n.endswith("weight"))
    assert train.main([*command, "--width", "8", "--out", "wide"]) == 2
    assert "--width 8: the generator in --init first/g.pt has --width 4" in capsys.readouterr().err
    assert train.main([*command, *still, "--resume", "--init", "gone.pt"]) == 0  # no longer read


class Code:
    """Unpickling this would leave a file behind."""
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def bad_checkpoint(kind):
    path = Path(f"{kind}.pt")
    torch.save({"generator": {}, "width": 4, "test_digest": ""} if kind != "code" else Code(), path)
    if kind in ("cut", "empty", "text"):
        path.write_bytes({"cut": path.read_bytes()[:-200], "empty": b"", "text": b"hello"}[kind])
    if kind == "other":
        torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
    if kind == "tensor":
        torch.save(torch.zeros(3), path)
    if kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize("kind", [
    "missing", "cut", "empty", "text", "other", "tensor", "code", "unfit"])
def test_bad_checkpoints_are_one_line_and_run_no_code(kind, capsys):
    path = bad_checkpoint(kind)
    assert sample.main(["--ckpt", str(path), str(HERE / "in"), "out"]) == 2
    assert train.main(["--data", "demo", "--eval", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(path) in line for line in lines)
    assert not Path("ran").exists() and not Path("out").exists()


@pytest.mark.parametrize("kind", ["cut", "empty", "other", "code"])
def test_a_bad_last_pt_is_refused(kind, capsys):
    Path("runs").mkdir()
    bad_checkpoint(kind).rename("runs/last.pt")
    before = tree()
    assert train.main([*TINY, "--resume"]) == 2
    assert "--resume runs/last.pt" in capsys.readouterr().err and tree() == before


# ---------------------------------------------------------------------------------------------
# Several processes

WORKER = """
import sys, torch, models, train

def check_average(rank):
    # The averaged gradient of two halves is the whole's, on the critic (no batch norm).
    torch.manual_seed(0)
    critic, lab = models.PatchCritic(4), torch.rand(8, 3, 32, 32)
    gradients = []
    for batch in (lab, lab[rank::2]):
        critic.zero_grad()
        critic(batch).square().mean().backward()
        gradients.append([p.grad.clone() for p in critic.parameters()])
    train.average_gradients(critic)
    whole, part = gradients
    averaged = [p.grad for p in critic.parameters()]
    close = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-7)  # order of summation
    assert all(map(close, whole, averaged)) and not all(map(close, part, averaged))

train_epoch = train.train_epoch
def spy(run, photos, epoch):
    check_average(run.rank)
    result = train_epoch(run, photos, epoch)
    networks = (run.generator, run.critic, run.ema)
    torch.save([list(n.parameters()) for n in networks], f"{epoch}-{run.rank}.pt")
    return result
train.train_epoch = spy
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_stay_bit_identical():
    Path("worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "worker.py", *TINY, "--pretrain-epochs", "1", "--epochs", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for epoch in range(2):
        assert same(*[torch.load(f"{epoch}-{rank}.pt", weights_only=False) for rank in range(2)])
    assert result.stdout.count("epoch 2/2") == 1 and len(read_log("runs")) == 2  # rank 0 alone


# ---------------------------------------------------------------------------------------------
# Inference

@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A generator that has learned nothing, but colours strongly."""
    torch.manual_seed(0)
    generator = models.UNet(4)
    nn.init.normal_(generator.head.weight, 0, 1.0)
    path = tmp_path_factory.mktemp("ckpt") / "g.pt"
    state = generator.state_dict()
    torch.save({"generator": state, "width": 4, "size": 32, "test_digest": ""}, path)
    return str(path)


def lightness(image):
    return rgb2lab(np.asarray(image.convert("RGB")))[..., 0]


def colorized(ckpt, name, status=0):
    """Run sample.py on the file name; returns the picture that it wrote."""
    assert sample.main(["--ckpt", ckpt, name, "out"]) == status
    (path,) = [p for p in Path("out").iterdir() if p.name != "grid.png"]
    with Image.open(path) as image:
        image.load()
        return image


GREY = photo((50, 37), mode="L")
MASK = photo((50, 37), seed=5, mode="L")
RAMP = np.linspace(-3.0, 9.0, 50 * 37).reshape(37, 50)


def palette_with_transparency():
    image = photo((50, 37)).quantize(16)
    image.info["transparency"] = 3
    return image


def deep(dtype):
    return Image.fromarray((np.asarray(GREY).astype(int) * 257).astype(dtype))


def merged(mode, *bands):
    return Image.merge(mode, bands)


KINDS = {  # name: (picture, what its lightness is to be, alpha, save options)
    "grey.png": (GREY, GREY, None),
    "grey.jpg": (GREY, None, None),
    "grey.bmp": (GREY, GREY, None),
    "grey.webp": (GREY, None, None),
    "grey.tif": (GREY, GREY, None),
    "deep.png": (deep("<u2"), GREY, None),
    "deep-little.tif": (deep("<u2"), GREY, None),
    "deep-big.tif": (deep(">u2"), GREY, None),
    "integer.tif": (Image.fromarray(np.asarray(GREY).astype(np.int32) * 1000 - 5), None, None),
    "float.tif": (Image.fromarray(RAMP.astype(np.float32)),
                  Image.fromarray((RAMP * 255 / 12 + 63.75).round().astype(np.uint8)), None),
    "bit.png": (GREY.convert("1"), GREY.convert("1"), None),
    "grey-alpha.png": (merged("LA", GREY, MASK), GREY, MASK),
    "palette.png": (photo((50, 37)).quantize(16), photo((50, 37)).quantize(16), None),
    "palette-alpha.png": (palette_with_transparency(), photo((50, 37)).quantize(16),
                          palette_with_transparency().convert("RGBA").getchannel("A")),
    "rgb.png": (photo((50, 37)), photo((50, 37)), None),
    "rgba.png": (merged("RGBA", *photo((50, 37)).split(), MASK), photo((50, 37)), MASK),
    "rgba.webp": (merged("RGBA", *photo((50, 37)).split(), MASK), None, MASK),
    "rgba.tif": (merged("RGBA", *photo((50, 37)).split(), MASK), photo((50, 37)), MASK),
    "cmyk.jpg": (photo((50, 37)).convert("CMYK"), None, None),
    "ycbcr.jpg": (photo((50, 37)).convert("YCbCr"), None, None),
    "cmyk.tif": (photo((50, 37)).convert("CMYK"), photo((50, 37)).convert("CMYK"), None),
    "page.gif": (GREY, GREY, None),
    "map.ppm": (photo((50, 37)), photo((50, 37)), None),
    "pixel.png": (GREY.crop((0, 0, 1, 1)), GREY.crop((0, 0, 1, 1)), None),
    "line.png": (GREY.resize((1, 300)), GREY.resize((1, 300)), None),
    "row.png": (GREY.resize((900, 2)), GREY.resize((900, 2)), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture(name, ckpt):
    picture, expected, alpha = KINDS[name]
    picture.save(name)
    result = colorized(ckpt, name)
    assert result.size == picture.size
    assert Path("out", name if Path(name).suffix in sample.SAVE else f"{name}.png").exists()
    if expected is None:  # a lossy or rescaled input: what Pillow reads of it
        with Image.open(name) as image:
            expected = data.to_8bit(image).convert("RGB")
    # 8 bits: a rounded RGB is at most half a level off in each channel, 0.6 of L* near black.
    loss = 0.7 if Path(name).suffix != ".jpg" else 4.0  # and JPEG at quality 95
    assert np.abs(lightness(result) - lightness(expected)).max() < loss
    assert np.ptp(np.asarray(result.convert("RGB")).astype(int), axis=2).max() > 8 or name in (
        "pixel.png", "bit.png")  # black and white have no colour
    if alpha is None:
        assert not result.has_transparency_data
    else:
        assert np.array_equal(result.convert("RGBA").getchannel("A"), alpha)


@pytest.mark.parametrize("options", [
    {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"tile": (16, 16)}])
def test_tiff_compressions(options, ckpt):
    GREY.save("a.tif", **{k: v for k, v in options.items() if k != "tile"})
    if "tile" in options:
        write_tiled_tiff("a.tif", np.asarray(GREY))
    assert np.abs(lightness(colorized(ckpt, "a.tif")) - lightness(GREY)).max() < 0.7


def write_tiled_tiff(path, values):
    """A little-endian grey TIFF in 16 x 16 tiles, which Pillow reads but does not write."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % 16), (0, -width % 16)))
    tiles = [padded[y : y + 16, x : x + 16].tobytes()
             for y in range(0, padded.shape[0], 16) for x in range(0, padded.shape[1], 16)]
    n = len(tiles)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1),
               (262, 3, 1, 1), (277, 3, 1, 1), (322, 4, 1, 16), (323, 4, 1, 16), (324, 4, n, 0),
               (325, 4, n, 0)]
    arrays = 8 + 2 + 12 * len(entries) + 4
    entries[8], entries[9] = (324, 4, n, arrays), (325, 4, n, arrays + 4 * n)
    offsets = [arrays + 8 * n + 256 * i for i in range(n)]
    Path(path).write_bytes(
        struct.pack("<2sHIH", b"II", 42, 8, len(entries))
        + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
        + struct.pack(f"<{n}I", *offsets) + struct.pack(f"<{n}I", *[256] * n) + b"".join(tiles))


def test_several_pages_are_said_once(ckpt, capsys):
    for name in ("a.tif", "b.gif"):
        GREY.save(name, save_all=True, append_images=[MASK])
    Path("in").mkdir()
    for name in ("a.tif", "b.gif"):
        Path(name).rename(Path("in", name))
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
    assert capsys.readouterr().out.count("first is colorized") == 1
    for name in ("a.tif", "b.gif.png"):
        with Image.open(Path("out", name)) as image:
            assert np.abs(lightness(image) - lightness(GREY)).max() < 0.7
    assert not Path("out/b.gif").exists()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, ckpt):
    exif = Image.Exif()
    exif[0x0112] = orientation
    GREY.save("a.png", exif=exif)
    T = Image.Transpose
    upright = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
               6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}
    expected = GREY.transpose(upright[orientation]) if orientation > 1 else GREY
    result = colorized(ckpt, "a.png")
    assert result.size == expected.size and not result.getexif().get(0x0112)
    assert np.abs(lightness(result) - lightness(expected)).max() < 0.7


def icc(kind):
    """A profile whose colours differ from sRGB: a gamma of 1 for RGB or grey."""
    tone = b"curv" + bytes(4) + struct.pack(">I", 0)  # identity
    def xyz(*v):
        return b"XYZ " + bytes(4) + struct.pack(">3i", *[round(x * 65536) for x in v])
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249)}
    if kind == b"GRAY":
        tags |= {b"kTRC": tone}
    else:
        tags |= {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
                 b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": tone, b"gTRC": tone, b"bTRC": tone}
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">2I", offset + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", kind, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("picture, kind", [(GREY, b"GRAY"), (photo((50, 37)), b"RGB ")])
def test_icc_profiles_are_converted_to_srgb(picture, kind, ckpt):
    picture.save("a.png", icc_profile=icc(kind))
    values = np.asarray(picture) / 255
    srgb = np.where(values > 0.0031308, 1.055 * values ** (1 / 2.4) - 0.055, 12.92 * values)
    expected = Image.fromarray((srgb * 255).round().astype(np.uint8))
    assert np.abs(lightness(expected) - lightness(picture)).mean() > 5  # the profile matters
    # lcms works in 8 bits with tables: a level or two in dark tones.
    assert np.abs(lightness(colorized(ckpt, "a.png")) - lightness(expected)).max() < 2.5


@pytest.mark.parametrize("profile", [
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"broken"])
def test_a_profile_that_does_not_fit_is_ignored(profile, ckpt):
    GREY.save("a.png", icc_profile=profile)
    assert np.abs(lightness(colorized(ckpt, "a.png")) - lightness(GREY)).max() < 0.7


def test_strips_have_no_seams(ckpt, monkeypatch):
    photo((90, 301)).save("a.png")
    whole = colorized(ckpt, "a.png")
    monkeypatch.setattr(sample, "STRIP_PIXELS", 90 * 7)
    assert np.array_equal(whole, colorized(ckpt, "a.png"))


def test_a_folder_is_mirrored_and_measured(ckpt, capsys):
    Path("in/sub/deep").mkdir(parents=True)
    Path("elsewhere").mkdir()
    for path in ("in/a.JPG", "in/sub/a.jpg", "in/sub/deep/grey.png", "elsewhere/linked.png"):
        (GREY if "grey" in path else photo((50, 37))).save(path)
    Path("in/link.png").symlink_to(Path("elsewhere/linked.png").resolve())
    Path("in/folder").symlink_to(Path("elsewhere").resolve())
    Path("in/notes.txt").write_text("left alone")
    os.mkfifo("in/pipe.png")
    for _ in range(2):  # an earlier run's outputs are replaced
        before = tree("in")
        assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
        assert sorted(tree("out")) == ["out/a.JPG", "out/grid.png", "out/link.png", "out/sub/a.jpg",
                                       "out/sub/deep/grey.png"]
        assert tree("in") == before
        out = capsys.readouterr().out
        assert out.count(" dB\n") == 3
        assert "4 colorized" in out and "on the 3 that had colour" in out
    with Image.open("out/a.JPG") as image:
        assert image.format == "JPEG"
        real = np.asarray(Image.open("in/a.JPG"))
        error = np.square(np.asarray(image).astype(float) - real).mean()
    said = float(out.split("a.JPG: ")[1].split()[0])
    assert said == pytest.approx(10 * math.log10(255**2 / error), abs=0.3)  # before JPEG's own loss
    with Image.open("out/grid.png") as image:
        assert image.size == (4 * 258 + 2, 3 * 258 + 2)


def test_no_two_inputs_share_an_output(ckpt):
    Path("in").mkdir()
    rgba = merged("RGBA", *photo((50, 37)).split(), MASK)
    rgba.save("in/a.jpg", "PNG")  # its alpha does not survive in a JPEG
    for name in ("a.gif", "a.gif.png", "a.png", "grid.png"):
        GREY.save(Path("in", name))
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
    assert sorted(tree("out")) == [
        "out/a.gif.png", "out/a.gif.png.png", "out/a.jpg.png", "out/a.png", "out/grid-grid.png",
        "out/grid.png"]


def test_broken_files_are_named_and_the_others_colorized(ckpt, capsys):
    make_photos("in", 3)
    png = Path("in/a/00.png").read_bytes()
    Path("in/empty.png").write_bytes(b"")
    Path("in/cut.png").write_bytes(png[: len(png) // 2])
    Path("in/text.jpg").write_text("no picture")
    huge = bytearray(png)
    huge[16:24] = struct.pack(">2I", 60000, 60000)
    huge[29:33] = struct.pack(">I", __import__("zlib").crc32(huge[12:29]))
    Path("in/huge.png").write_bytes(huge)
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 1
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert [line.split(":")[0] for line in errors] == [
        "in/cut.png", "in/empty.png", "in/huge.png", "in/text.jpg"]
    assert "3 colorized" in captured.out and "4 failed" in captured.out
    assert len(tree("out")) == 4
    assert sample.main(["--ckpt", ckpt, "in/cut.png", "none"]) == 1 and not Path("none").exists()


def test_odd_names_and_folders(ckpt, capsys):
    Path("in").mkdir()
    for name in ("n" * 246 + ".png", os.fsdecode(b"caf\xe9.png"), "a b: ü.png"):
        photo().save(Path("in", name))
    assert sample.main(["--ckpt", ckpt, "in", "out"]) == 0
    assert "caf\\udce9.png: " in capsys.readouterr().out and len(tree("out")) == 4
    assert sample.main(["--ckpt", ckpt, "in", "/proc/none"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    Path("empty").mkdir()
    assert sample.main(["--ckpt", ckpt, "empty", "none"]) == 1
    assert "no file with the suffix of a picture" in capsys.readouterr().err


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
    import resource
    seeds, rng = {}, random.Random(0)
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "gif"):
        buffer = io.BytesIO()
        photo((60, 45)).save(buffer, data.Image.registered_extensions()[f".{suffix}"])
        seeds[suffix] = buffer.getvalue()
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


# ---------------------------------------------------------------------------------------------
# Command-line mistakes

@pytest.mark.parametrize("options, named", [
    (line.split(" | ")[0].split(), line.split(" | ")[1]) for line in """
--size 100 | --size
--size 16 | --size
--size 0 | --size
--size -64 | --size
--size 1000000 | --size
--size big | --size
--width 0 | --width
--width 10000 | --width
--batch-size 0 | --batch-size
--batch-size -1 | --batch-size
--batch-size 2.5 | --batch-size
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
--lr fast | --lr
--ema 1.5 | --ema
--ema -0.1 | --ema
--amp fp8 | --amp
--device gpu | --device
--device cuda:99 | --device
--seed -1 | --seed
--sample-every 0 | --sample-every
--data file.txt | --data
--data empty | --data
--data demo --out file.txt/x | --out
--eval missing.pt | --eval
--data demo --init missing.pt | --init
--eval file.txt | --eval
--data demo --resume --out broken | --resume
--frobnicate | --frobnicate
--epochs | --epochs
""".strip().splitlines()])
def test_train_mistakes_are_one_line(options, named, capsys):
    Path("empty").mkdir()
    Path("file.txt").write_text("no picture")
    Path("broken").mkdir()
    Path("broken/last.pt").write_text("no checkpoint")
    before = tree()
    try:
        status = train.main(options)
    except SystemExit as error:
        status = error.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and named in line and tree() == before and not Path("runs").exists()


@pytest.mark.parametrize("command, named", [
    ("missing out", "missing"), ("in in", "out in"), ("in in/out", "in/out"),
    ("in/a/00.png in/a", "overwrite"), ("in file", "out file"), ("in", "out"),
    ("in out --device gpu", "--device"), ("in out --size 3", "--size")])
def test_sample_mistakes_are_one_line(command, named, ckpt, capsys):
    make_photos("in", 2)
    Path("file").touch()
    before = tree()
    try:
        status = sample.main(["--ckpt", ckpt, *command.split()])
    except SystemExit as error:
        status = error.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and named in line and tree() == before

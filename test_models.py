"""What the colorizer promises: CPU, no network, the slow ones last. python -m pytest"""
import os
os.environ["OMP_NUM_THREADS"] = "1"  # threads of torch and of the processes started here: steady
import copy
import csv
import io
import math
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from skimage.color import lab2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import data
import models
import sample
import train

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = "--data photos --size 32 --width 4 --batch-size 7 --device cpu"  # two steps an epoch
PRE = f"{TINY} --pretrain-epochs 1 --epochs 0"  # half a second
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)  # of nested values


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and saves after every epoch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & have it ignored


def train_py(command):
    """The command line of train.py. Returns the exit status."""
    return train.main(command.split())


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
        assert got == status and all(name in line for name in ("error: ", *named)), (got, line)
        assert tree() == before
    return check


def photo(size=(40, 30), seed=0, mode="RGB"):
    """A smooth colourful picture, other for each seed."""
    noise = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def put(image, *paths):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def make_photos(folder, count=20, draw=photo):
    for i in range(count):
        put(draw(seed=i), Path(folder, "ab"[i % 2], f"{i:02}.png"))
    return Path(folder)


def tree(folder="."):
    """Every file below folder, with its content."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p): p.read_bytes() for p in files}


def read_log(out="runs"):
    return list(csv.DictReader(Path(out, "log.csv").read_text().splitlines()))


# --- Losses --------------------------------------------------------------------------------------

def test_losses_have_the_papers_signs():
    real, fake, lab = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0]), torch.rand(2, 3, 4, 4)
    assert train.critic_loss(real, fake) == 1.5 - 4  # falls as real scores above colorized
    assert train.generator_loss(torch.tensor(0.1), fake, 100.0) == pytest.approx(100 * 0.1 - 1.5)
    scores = train.score(lambda x: x.half(), lab[:, :1], lab[:, 1:])  # the mean of the map, float32
    assert torch.allclose(scores, lab.half().float().mean((1, 2, 3)))


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


def test_penalty_is_taken_between_real_and_fake_in_float32():
    seen, kernel = [], torch.ones(1, 3, 1, 1)
    def critic(lab):
        seen.extend((lab, nn.functional.conv2d(lab, kernel)))
        return seen[1]
    L, real, fake = torch.rand(50, 1, 8, 8), torch.ones(50, 2, 8, 8), torch.zeros(50, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        train.gradient_penalty(critic, L, real, fake.bfloat16())
    (lab, scores), mix = seen, seen[0][:, 1:].flatten(1)
    assert torch.equal(lab[:, :1], L) and (mix.amax(1) - mix.amin(1)).max() == 0  # one an image
    assert mix.min() >= 0 and mix.max() <= 1 and mix[:, 0].std() > 0.2  # uniform: 0.29
    assert scores.dtype == torch.float32


# --- Networks ------------------------------------------------------------------------------------

def test_networks_are_the_papers():
    assert models.PatchCritic(4)(torch.rand(2, 3, 128, 128)).shape == (2, 1, 13, 13)
    # Convolutions of Ronneberger's figure 1 with two outputs, and two numbers a batch-norm channel.
    assert sum(p.numel() for p in models.UNet().parameters()) == 31_036_546
    w = [3, 64, 128, 256, 512, 512, 1]
    weights = sum(16 * a * b for a, b in zip(w, w[1:]))
    assert sum(p.numel() for p in models.PatchCritic().parameters()) == weights + 64 + 1
    kinds = lambda layers: [type(layer).__name__ for layer in layers]
    generator, critic = models.UNet(4), models.PatchCritic(64).layers
    assert kinds([*generator.down1, generator.pool]) == [
        "Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["MaxPool2d"]
    up, x, skip = models.Up(4, 2), torch.rand(1, 4, 3, 3), torch.rand(1, 2, 6, 6)
    up.conv = nn.Identity()
    assert torch.equal(up(x, skip), torch.cat([skip, up.up(x)], 1))  # the skip connection first
    middle = ["Conv2d", "InstanceNorm2d", "LeakyReLU"] * 4
    assert kinds(critic) == ["Conv2d", "LeakyReLU", *middle, "Conv2d"]
    assert {m.negative_slope for m in critic if isinstance(m, nn.LeakyReLU)} == {0.2}
    convolutions = [m for m in critic if isinstance(m, nn.Conv2d)]
    for c, stride in zip(convolutions, [2, 2, 2, 1, 1, 1]):
        assert c.stride == (stride, stride) and (c.bias is None or not c.bias.any())
        assert abs(c.weight.std() - 0.02) < 0.002 and abs(c.weight.mean()) < 0.002  # > 3000 weights


def test_fading_and_contrast_of_a_print_do_not_change_its_colours():
    torch.manual_seed(0)
    generator, L = models.UNet(4).eval(), torch.rand(2, 1, 32, 32) * 2 - 1
    nn.init.normal_(generator.head.weight, 0, 10)
    answer = generator(L)
    assert answer.std((2, 3)).min() > 0.1  # it is no constant
    for c, d in ((0.5, 0.4), (2.0, -0.3)):
        assert torch.allclose(generator(c * L + d), answer, atol=1e-3)  # the norm's eps of 1e-5
    assert torch.allclose(generator(L[:1]), answer[:1], atol=1e-4)  # each image by itself
    nn.init.zeros_(generator.head.weight)
    generator.head.bias.data = torch.tensor([0.5, -2.0])
    assert generator(L)[0, :, 5, 5].tolist() == pytest.approx([math.tanh(0.5), math.tanh(-2)])


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
    expected = lab2rgb(to_numpy(lab))
    assert np.abs(to_numpy(data.lab_to_rgb(lab.float())) - expected).max() < 1e-4  # float32
    kept, lab = to_numpy(data.lab_to_rgb(lab.float(), keep_lightness=True)), to_numpy(lab)
    assert np.abs(rgb2lab(kept)[..., 0] - lab[..., 0]).max() < 0.05  # float32
    inside = np.abs(rgb2lab(expected) - lab).max(-1) < 1e-3
    assert inside.sum() > 3000 and np.abs(kept - expected)[inside].max() < 1e-4


def test_8_bit_colours_survive_the_way_to_the_networks_and_back():
    rgb = cube((0, 0, 0), (255, 255, 255), 52)
    near = (rgb + 0.4 * (rgb < 200) - 0.4 * (rgb > 200)) / 255  # rounded, not cut off
    assert torch.equal(train.to_uint8(*data.normalize(data.rgb_to_lab(near))), rgb.round().byte())
    ends = data.normalize(torch.tensor([0.0, 110, -110]).view(1, 3, 1, 1))
    assert torch.cat(ends, 1).flatten().tolist() == [-1, 1, -1]


def test_a_picture_has_colour_where_ab_differs_at_equal_lightness():
    L, zero = torch.linspace(20, 90, 64).expand(64, 64), torch.zeros(64, 64)
    sign = torch.tensor([1.0, -1.0]).repeat(32).view(-1, 1).expand(64, 64)
    lab = torch.stack([torch.stack([L, a, b]) for a, b in (
        (7 * sign, zero), (3.5 * sign, zero), (zero, 5 * sign), (3.5 * sign, 3.5 * sign),
        (zero, 25 - L / 4), (zero, zero))])  # the last but one as on a toned print
    answers = [True, False, True, True, False, False]  # 7, 3.5, 5 and 4.9, of 4
    assert data.has_colour(data.lab_to_rgb(lab)).tolist() == answers
    sepia = ImageOps.colorize(photo(mode="L"), (30, 15, 5), (255, 255, 255))
    for image, expected in ((sepia, False), (photo(), True)):
        image.save("a.jpg", quality=75)
        rgb = torch.from_numpy(np.array(Image.open("a.jpg"))).permute(2, 0, 1)[None] / 255
        assert data.has_colour(rgb).item() == expected


# --- Split, crops and ageing ---------------------------------------------------------------------

def test_the_split_is_for_ever_and_keeps_identical_images_together():
    parts = data.split(range(100, 120), range(120))  # a row is its own digest
    assert parts == ([118, 101, 119, 108, 110, 117, 106, 113, 104, 102, 105, 114, 109, 107],
                     [116, 111, 103], [100, 115, 112])  # the published figures hang on this
    make_photos("photos", 40)
    for i in range(20):  # by chance alone, 20 copies would all stay together once in 10^6 runs
        put(photo(seed=i), f"photos/copy-{i}.png")
    photos = data.Photos("photos", 32)
    parts = [photos.train, photos.val, photos.test]
    different = [{photos.images[row].numpy().tobytes() for row in rows} for rows in parts]
    assert sum(map(len, different)) == len(set.union(*different)) == 40
    assert sorted(torch.cat(parts).tolist()) == list(range(60))


def test_a_batch_is_the_whole_picture_as_pillow_scales_it():
    noise = np.random.RandomState(0).randint(0, 2, (12, 48, 48, 3), np.uint8) * 255
    for i, image in enumerate(noise):  # black and white in each channel: the hardest to scale down
        put(Image.fromarray(image), f"photos/{i:02}.png")
    lab = data.denormalize(*data.Photos("photos", 32).batch(torch.arange(12)))
    channels = noise.transpose(0, 3, 1, 2).reshape(36, 48, 48).astype(np.float32) / 255
    small = [Image.fromarray(c).resize((32, 32), Image.Resampling.BICUBIC) for c in channels]
    expected = rgb2lab(np.stack(small).reshape(12, 3, 32, 32).transpose(0, 2, 3, 1).clip(0, 1))
    assert np.abs(to_numpy(lab) - expected).max() < 1e-2  # float32


Y, X = torch.meshgrid(*[(torch.arange(96) + 0.5) / 96] * 2, indexing="ij")
COORDINATES = torch.stack([X, Y, 0 * X + 9])  # a picture of x and y in [0, 1], and 9


def test_each_image_gets_its_own_crop_mirrored_or_not():
    torch.manual_seed(0)
    crops = data.random_crops(COORDINATES.expand(4000, -1, -1, -1), 64)
    assert (crops[:, 2] - 9).abs().max() < 1e-4  # all of it inside
    first, last = crops[:, :2, 0, 0], crops[:, :2, -1, -1]  # centres of the corner pixels
    sides = (last - first) * 64 / 63
    assert 0.45 < (sides[:, 0] < 0).float().mean() < 0.55 and sides[:, 1].min() > 0  # 6 deviations
    sides = sides.abs()  # never enlarged: 64 pixels of at least two thirds of 96
    assert 0.6666 < sides.min() < 0.68 and 0.99 < sides.max() < 1.0001
    ratio, area = sides[:, 0] / sides[:, 1], sides.prod(1)
    assert 0.8999 < ratio.min() < 0.91 and 1.09 < ratio.max() < 1.1001
    assert area.mean() == pytest.approx((4 / 9 + 1) / 2, abs=0.01)  # 4 deviations
    start = torch.minimum(first, last) - sides / 128
    place = (start / (1 - sides))[sides.amax(1) < 0.9]  # uniform: 0 to 1
    assert -0.001 < place.min() and place.max() < 1.001 and (place.mean(0) - 0.5).abs().max() < 0.03
    assert (place.std(0) - 12 ** -0.5).abs().max() < 0.02


def test_some_pictures_lie_whole_on_paper():
    torch.manual_seed(0)
    crops = data.random_crops(COORDINATES.expand(1500, -1, -1, -1), 64, paper=0.4)
    margin = (crops - crops[:, 2:]).abs().amax(1) < 1e-4  # grey: its channels are equal
    framed = margin.flatten(1).any(1)
    assert 0.33 < framed.float().mean() < 0.44  # 3 deviations; some margins are too thin to see
    crops, margin = crops[framed], margin[framed]
    level = crops[:, 2].amin((1, 2))[:, None, None]
    assert -1e-4 < level.min() < 0.05 and 1.45 < level.max() < 1.5 and 0.65 < level.mean() < 0.85
    assert (crops[:, 2] - level)[margin].abs().max() < 1e-4  # one grey an image
    inside = crops[:, 2] > (9 + level) / 2
    low, high = (torch.where(inside[:, None], crops[:, :2], x).flatten(2) for x in (1, 0))
    assert low.amin(2).max() < 0.03 and high.amax(2).min() > 0.97  # to its edges, but for a pixel
    for columns in (inside.any(1), inside.any(2)):
        seen = columns.sum(1) / 64  # of the crop's side: 1 / 1.35 to 1
        assert 1 / 1.35 - 1 / 64 <= seen.min() < 0.77 and seen.max() == 1
        place = (columns.float().argmax(1) / 64 / (1 - seen))[seen < 0.9]
        assert abs(place.mean() - 0.5) < 0.06 and place.std() > 0.25  # uniform: 0.29


def test_random_grey_is_film_development_softness_fading_and_grain():
    """Six stripes of known colours tell all that was drawn for a picture."""
    torch.manual_seed(0)
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    picture = colours.T.repeat_interleave(10, 1)[:, None].expand(3, 60, 60)
    greys = data.random_grey(picture.expand(2000, -1, -1, -1) - 1e-7)  # crops round
    stripes = greys.view(2000, 60, 6, 10)
    black, white = (stripes[:, :, i, 1:-1].mean((1, 2))[:, None, None, None] for i in (0, 1))
    for cut in (black < 0.02, white > 0.98):  # of -0.1 to 0.25, of 0.75 to 1.1: each its own
        assert abs(cut.float().mean() - 0.12 / 0.35) < 0.05  # 4 deviations of 0.011
    assert 0.23 < black.max() < 0.26 and 0.74 < white.min() < 0.77
    assert greys.min() == 0 and greys.max() == 1
    whole = ((black > 0.1) & (white < 0.9)).flatten()  # here grain is not cut off
    noise = stripes[whole, 1:, 1, 2:-2].std((1, 2))
    assert noise.min() < 0.001 and 0.028 < noise.max() < 0.032  # uniform to 0.03
    stripes = ((stripes - black) / (white - black))[whole]  # no longer faded
    assert (stripes[:, 0, 1, 1:-1].mean(1) - 1).abs().max() < 0.1  # no darker along the edge: grain
    soft = 3 * stripes[:, :, 0, -1].mean(1)  # one of three columns is white
    assert -0.1 < soft.min() < 0.05 and 0.95 < soft.max() < 1.1 and abs(soft.mean() - 0.5) < 0.1
    means = stripes[..., 1:-1].mean((1, 3))
    gamma = means[:, 2].log() / math.log(0.5)
    assert 0.66 < gamma.min() < 0.72 and 1.4 < gamma.max() < 1.51 and abs(gamma.log().mean()) < 0.06
    weights = means[:, 3:].clamp_min(0) ** (1 / gamma[:, None])  # of red, green and blue
    assert (weights.sum(1) - 1).abs().max() < 0.06  # grain, near 0 drawn out by gamma
    drawn = np.random.RandomState(0).uniform(0, 2, (10**5, 3)) * (0.299, 0.587, 0.114)  # luma's
    drawn /= drawn.sum(1, keepdims=True)
    assert np.abs(weights.numpy().mean(0) - drawn.mean(0)).max() < 0.04  # 4 deviations
    assert np.abs(weights.numpy().std(0) - drawn.std(0)).max() < 0.03


def test_ageing_changes_lightness_alone_of_the_share_it_is_told(monkeypatch):
    photos, papers = data.Photos(make_photos("photos"), 32), []
    L, ab = photos.batch(photos.train)
    seen, same = photos.batch(photos.train, aged=1.0)
    assert torch.equal(same, ab) and (seen - L).abs().amax((1, 2, 3)).min() > 0.01  # every one
    aged = (photos.batch(photos.train[:1].expand(1000), aged=0.25)[0] != L[0]).flatten(1).any(1)
    assert abs(aged.float().mean() - 0.25) < 0.055  # 4 deviations
    # Paper up to 1.5, beyond white, has no colour; L is the L* of the grey.
    monkeypatch.setattr(data, "random_crops", lambda rgb, size, paper:
                        papers.append(paper) or torch.full((2, 3, size, size), 1.5))
    monkeypatch.setattr(data, "random_grey", lambda rgb: rgb[:, :1] - 1)
    L, ab = photos.batch(photos.val[:2], crop=True, aged=1.0)
    assert papers == [0.5] and ab.abs().max() < 1e-4  # float32
    assert (L - rgb2lab(np.full((1, 1, 3), 0.5))[0, 0, 0] / 50 + 1).abs().max() < 1e-4
    assert (photos.batch(photos.val[:2], crop=True)[0] - 1).abs().max() < 1e-4  # 100, not more


# --- Training, evaluation, checkpoints -----------------------------------------------------------

@pytest.fixture
def run():
    args = train.parse_args(f"{PRE} --amp off --lambda-gp 2 --lambda-l1 3".split())
    args.nproc_per_node = 1
    return train.Run(args, CPU)


@pytest.mark.parametrize("critic_steps, generator_steps", [(1, 2), (3, 1)])
def test_a_batch_is_the_papers_steps_one_by_one(critic_steps, generator_steps, run):
    run.args.critic_steps, run.args.generator_steps = critic_steps, generator_steps
    generator, critic = copy.deepcopy(run.generator), copy.deepcopy(run.critic)
    sgd = lambda network: torch.optim.SGD(network.parameters(), lr=0.1)  # it shows the gradient
    run.optimizer_g, run.optimizer_c = sgd(run.generator), sgd(run.critic)
    optimizer_g, optimizer_c = sgd(generator), sgd(critic)
    L, ab = (torch.rand(4, 3, 32, 32) * 2 - 1).split([1, 2], 1)
    torch.manual_seed(5)  # of the mixes between real and colorized
    terms = train.adversarial_step(run, L, ab)
    torch.manual_seed(5)
    fake = generator(L)
    for _ in range(critic_steps):
        real_score, fake_score = (critic(torch.cat([L, x.detach()], 1)).mean() for x in (ab, fake))
        penalty = train.gradient_penalty(critic, L, ab, fake.detach())
        optimizer_c.zero_grad()
        (fake_score - real_score + 2 * penalty).backward()
        optimizer_c.step()
    for i in range(generator_steps):
        fake = generator(L) if i else fake
        l1, realness = (fake - ab).abs().mean(), critic(torch.cat([L, fake], 1)).mean()
        optimizer_g.zero_grad()
        (3 * l1 - realness).backward()
        optimizer_g.step()
    expected = {"l1": l1, "adversarial": -realness, "wasserstein": real_score - fake_score,
                "penalty": penalty}
    for ours, theirs in ((terms, expected), (run.generator.state_dict(), generator.state_dict()),
                         (run.critic.state_dict(), critic.state_dict())):
        for name in theirs:  # float32, means taken in another order
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name


def test_a_scaled_loss_leaves_the_true_gradient_and_an_overflow_no_step():
    network, x = nn.Linear(3, 1), torch.rand(4, 3)
    optimizer, scaler = torch.optim.SGD(network.parameters(), lr=1.0), torch.amp.GradScaler("cpu")
    for factor, expected in ((1, x.sum(0)), (1, x.sum(0)), (math.inf, torch.zeros(3))):
        before = network.weight.detach().clone()
        train.update(network, optimizer, network(x).sum() * factor, scaler)
        assert torch.allclose(before - network.weight, expected, atol=1e-5)  # float32
    assert scaler.get_scale() == 2**15  # half of what it begins with


@pytest.mark.parametrize("amp, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bits_train_on_the_cpu(amp, dtype, monkeypatch):
    make_photos("photos")
    seen, l1 = [], nn.functional.l1_loss
    monkeypatch.setattr(nn.functional, "l1_loss", lambda x, y: seen.append(x.dtype) or l1(x, y))
    assert train_py(f"{PRE} --epochs 1 --amp {amp}") == 0
    assert seen == [dtype] * 6  # both phases
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7 + (amp == "bf16"), 5))
    assert train.resolve_amp("auto", torch.device("cuda")) == amp
    assert bool(torch.load("runs/last.pt")["scaler"]) == (amp == "fp16")  # bf16 needs none


def test_ema_warms_up_and_averages_batch_norm_too():
    source, ema = models.UNet(2), models.UNet(2)
    for network, value in ((source, 1), (ema, 0)):
        for tensor in network.state_dict().values():
            tensor.fill_(value)
    for updates, expected in ((0, 0.9), (10**6, 0.9001)):  # decay 1 / 10, then 0.999
        train.update_ema(ema, source, updates, decay=0.999)
        for name, value in ema.state_dict().items():
            assert "tracked" in name or value.mean().item() == pytest.approx(expected), name


def test_learning_rate_and_adam(run):
    args = train.parse_args(["--pretrain-epochs", "10", "--pretrain-lr", "0.5", "--lr", "0.1"])
    published = {"size": 128, "width": 64, "batch_size": 32, "pretrain_epochs": 100, "epochs": 110,
                 "critic_steps": 1, "generator_steps": 2, "lambda_l1": 1000, "lambda_gp": 10,
                 "pretrain_lr": 1e-3, "lr": 1e-4, "aged": 0.5, "ema": 0.999}
    assert published.items() <= vars(train.parse_args([])).items()
    rates = [train.learning_rate(args, epoch) for epoch in (0, 0.5, 1, 5.5, 9.9999, 10, 50)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.25, 0, 0.1, 0.1], abs=1e-6)
    assert run.optimizer_g.defaults["betas"] == run.optimizer_c.defaults["betas"] == (0.5, 0.9)


def test_an_epoch_is_every_image_once_anew_in_order_crop_and_age(monkeypatch):
    make_photos("photos")
    batches, averaged, batch, update = [], [], data.Photos.batch, train.update_ema
    def spy(photos, rows, crop=False, aged=0.0):
        if crop:
            batches.append((rows.tolist(), torch.initial_seed(), aged))
        return batch(photos, rows, crop, aged)
    monkeypatch.setattr(data.Photos, "batch", spy)
    monkeypatch.setattr(train, "update_ema", lambda *x: averaged.append(x[2:]) or update(*x))
    command = f"{TINY} --pretrain-epochs 3 --epochs 0 --aged 0.3 --ema 0.9"
    for options in ("--out a", "--out b", "--out c --seed 1"):
        assert train_py(f"{command} {options}") == 0
    assert averaged == [(i, 0.9) for i in range(6)] * 3  # the warm-up counts batches, of all epochs
    a, b, c = batches[:6], batches[6:12], batches[12:]
    assert a == b and {aged for _, _, aged in a} == {0.3}
    epochs = [x[i][0] + x[i + 1][0] for x in (a, c) for i in (0, 2, 4)]
    rows = data.Photos("photos", 32).train.tolist()
    assert len({*map(tuple, epochs)}) == 6 and all(sorted(e) == sorted(rows) for e in epochs)
    assert len({seed for _, seed, _ in a + c}) == 6  # of crops and ageing: each epoch its own
    rates = {torch.load("a/last.pt")[f"optimizer_{x}"]["param_groups"][0]["lr"] for x in "gc"}
    assert rates == {train.learning_rate(train.parse_args(command.split()), 2.75)}  # amid the last
    critics = [torch.load(f"{out}/last.pt")["critic"]["layers.0.weight"] for out in "ac"]
    assert len(critics[0]) == 4 and not torch.equal(*critics)  # --width's, and each seed its own


def test_colourfulness_of_two_colours():
    # Red, blue: rg = 255, 0; yb = 127.5, -255. By hand: two values deviate by distance / sqrt(2).
    image = torch.tensor([[255, 0], [0, 0], [0, 255]], dtype=torch.uint8).view(1, 3, 1, 2)
    expected = math.hypot(255, 382.5) / 2**0.5 + 0.3 * math.hypot(127.5, 63.75)
    assert train.colourfulness(image).item() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:.*negative Z")
def test_eval_is_one_table_and_one_picture_of_several_generators(capsys, monkeypatch):
    monkeypatch.setattr(train, "chunks", lambda photos, rows: rows.split(4))  # of 6 test images
    photos, colours = data.Photos(make_photos("photos", 40), 32), {}
    (L, ab), command = photos.batch(photos.test), "--eval a.pt b.pt --data photos --device cpu"
    torch.manual_seed(0)  # each time the same ageing
    aged = torch.cat([photos.batch(rows, aged=1.0)[0] for rows in photos.test.split(4)])
    for name, shift in (("a.pt", [0] * 6), ("b.pt", [5, -5] * 3)):
        means = photos.images[photos.test].double().mean((1, 2, 3)) + torch.tensor(shift)
        generator = models.UNet(4)
        nn.init.normal_(generator.head.weight, 0, 3)  # has learned nothing, but colours strongly
        torch.save({"generator": generator.state_dict(), "size": 32, "test_means": means.tolist(),
                    "history": [{"epoch": 3}, {"width": 4}]}, name)
        colours[name], colours[f"{name}, aged photographs"] = map(generator.eval(), (L, aged))
    colours |= {"no colour": ab * 0, "real": ab}
    before = tree()
    assert train_py(command) == 0 and tree() == before  # files only where --out is given
    capsys.readouterr()
    assert train_py(f"{command} --out out") == 0
    out = capsys.readouterr().out
    assert Path("out/test.txt").read_text() == out
    assert out.startswith("a.pt: epoch 3\na.pt: width 4\nwarning: b.pt was")
    *lines, real = out.splitlines()
    table = {row[0]: row[1:] for row in (line.rsplit(maxsplit=5) for line in lines)}
    pictures = {name: (lab2rgb(to_numpy(data.denormalize(L, x.detach()))) * 255).round().astype(
        np.uint8) for name, x in colours.items()}  # all with the photograph's own L
    psnr = {name: np.array([*map(peak_signal_noise_ratio, pictures["real"], picture)]).clip(0, 100)
            for name, picture in pictures.items()}
    count = lambda x: Counter(map(tuple, (rgb2lab(x)[..., 1:] / 10).round().reshape(-1, 2)))
    for name, picture in pictures.items():
        pairs = zip(pictures["real"], picture)
        ssim = np.mean([structural_similarity(*pair, channel_axis=2) for pair in pairs])
        colour = train.colourfulness(torch.from_numpy(picture).permute(0, 3, 1, 2)).mean().item()
        if name == "real":
            assert real.split() == ["real", f"{colour:.1f}"]
            continue
        worse = 100 * (psnr[name] < psnr["no colour"]).mean()
        mix = 100 * (count(picture) - count(pictures["real"])).total() / ab[:, 0].numel()
        expected = psnr[name].mean(), ssim, colour, mix, worse
        for said, value, limit in zip(table[name], expected, (0.02, 0.002, 0.1, 0.6, 0.6)):
            assert float(said.strip("%")) == pytest.approx(value, abs=limit), name  # as printed
    with Image.open("out/test.png") as image:  # a row each, with margins of 2
        cells = np.asarray(image)[2:, 2:].reshape(4, 34, 6, 34, 3)[:, :32, :, :32].swapaxes(1, 2)
    for row, name in zip(cells.astype(int), ("no colour", "a.pt", "b.pt", "real")):
        assert np.abs(row - pictures[name]).max() <= 1  # a level the other way


def test_training_learns_and_reports(capsys, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: written.append(b.name) or replace(a, b))
    monkeypatch.setattr(train, "SAVE_SECONDS", 1000)
    toned = lambda seed: ImageOps.colorize(photo(seed=seed, mode="L"), "blue", "yellow")
    make_photos("photos", 40, toned)  # colour follows from lightness: easily learned
    assert train_py(f"{TINY} --pretrain-epochs 8 --epochs 1 --sample-every 6 --seed 3 --width 8 "
                    "--pretrain-lr 0.01 --aged 0.2") == 0
    rows, table = read_log(), capsys.readouterr().out.splitlines()[-9:]
    assert [x["phase"] + "+" * (x["penalty"] > "") for x in rows] == ["pretrain"] * 8 + ["wgan-gp+"]
    assert 0.7 * float(rows[8]["l1"]) < float(rows[7]["l1"]) < 0.7 * float(rows[0]["l1"]) < 0.5
    assert float(table[6].split()[1]) > float(table[3].split()[2]) + 1  # than no colour
    assert Path("runs/test.txt").read_text().splitlines() == table
    save = ["last.pt", "g.pt", "log.csv"]  # the last two follow from the first
    assert written[1:] == [*save, "epoch-0006.png", "pretrained.pt", "epoch-0009.png", *save,
                           "test.txt", "test.png"]
    photos, last, ema = data.Photos("photos", 32), torch.load("runs/last.pt"), models.UNet(8).eval()
    ema.load_state_dict(last["ema"])  # the moving average is what counts
    for name, share in (("val_psnr", 0.0), ("val_aged_psnr", 1.0)):
        psnr = train.measure(ema, photos, photos.val, aged=share)["psnr"].mean()
        assert float(rows[8][name]) == pytest.approx(psnr.item(), abs=1e-3)
    train.draw([ema], photos, photos.val[:8], Path("expected.png"))
    assert np.abs(pixels("runs/epoch-0009.png") - pixels("expected.png")).max() <= 1
    half = {k: v.half() if v.ndim > 1 else v for k, v in last["ema"].items()}
    assert_identical(torch.load("runs/g.pt")["generator"], half)
    for first, count in ((0, 40), (100, 44)):  # whatever --seed was, the same test part; others
        make_photos("photos", count, lambda seed: toned(seed + first))
        assert train_py("--eval runs/g.pt --data photos --device cpu") == 0
        out = capsys.readouterr().out
        figures = [[line.split()[-5:] for line in x[-3:-1]] for x in (out.splitlines(), table)]
        assert (figures[0] == figures[1]) == (first == 0)
        assert ("warning: runs/g.pt was made with other images" in out) == (first == 100)


def test_resume_refuses_other_options_and_other_photographs(refused):
    make_photos("photos")
    assert train_py(PRE) == 0
    command = f"{PRE} --epochs 1 --resume"
    Path("photos").rename("there")
    for option in ("--size 48", "--width 8", "--batch-size 8", "--pretrain-epochs 3", "--seed 1",
                   "--critic-steps 2", "--generator-steps 1", "--lambda-l1 10.0", "--lr 0.1",
                   "--lambda-gp 1.0", "--pretrain-lr 0.1", "--aged 0.1", "--ema 0.5", "--amp bf16"):
        refused(train_py, f"{command} {option}", option, "the run in runs has")
    assert train_py(f"{command} --data there --sample-every 1 --device auto --amp off") == 0
    photo(seed=77).save("there/a/00.png")
    data.Photos("there", 32)  # into the cache, which is no damage
    refused(train_py, f"{command} --epochs 2 --data there", "--data there: not the images")


def test_divergence_does_not_spoil_a_run(run, refused, capsys):
    make_photos("photos")
    command = f"{PRE} --lambda-gp 2 --lambda-l1 3 --lr 1e6"  # weights that float16 cannot hold
    Path("runs").mkdir()  # empty, as Ctrl-C before the first save leaves it
    assert train_py(command) == 0
    refused(train_py, command, "--out runs: is there already", "--resume")
    before = tree()
    assert train_py(f"{command} --epochs 1 --resume") == 1
    assert before.items() <= tree().items()
    (line,) = capsys.readouterr().err.splitlines()
    assert "epoch 2 diverged" in line and "lower --lr" in line
    run.critic.layers[0].weight.data.fill_(1e5)  # beyond float16, the critic's too
    with pytest.raises(FloatingPointError):
        run.check_finite({}, 1)


@pytest.mark.parametrize("epochs", ["--epochs 0", "--pretrain-epochs 0 --epochs 1"])
def test_init_starts_both_phases_from_another_generator_and_keeps_its_history(epochs, refused):
    make_photos("photos")
    assert train_py(f"{PRE} --out first") == 0
    command = f"{PRE} {epochs} --size 48 --pretrain-lr 0 --lr 0 --init"
    assert train_py(f"{command} first/g.pt") == 0  # at another size; without a step, as they were
    first, last = torch.load("first/g.pt")["generator"], torch.load("runs/last.pt")
    for name, value in first.items():  # batch norm's statistics follow the pictures
        for state in (last["generator"], last["ema"]):  # of the EMA: rounding
            assert "running" in name or "tracked" in name or torch.allclose(
                state[name], value.float(), rtol=1e-5), name
    refused(train_py, f"{command} first/g.pt --width 8 --out wide", "--width 8: --init first/g.pt")
    refused(train_py, "--eval first/g.pt runs/g.pt", "--eval: generators", "[32, 48]")
    assert train_py(f"{command} gone.pt --resume --epochs 2") == 0  # no longer read
    assert [options["size"] for options in torch.load("runs/g.pt")["history"]] == [32, 48]


def test_layers_of_ones_own_train_and_load(monkeypatch):
    class Attention(models.UNet):
        def __init__(self, width=64):
            super().__init__(width)
            self.down1 = nn.Sequential(self.down1)  # names of its own
            self.register_buffer("strength", torch.tensor(0.5), persistent=False)  # not saved
    make_photos("photos")
    for module in (models, train):
        monkeypatch.setattr(module, "UNet", Attention)
    assert train_py(PRE) == 0
    generator, info = models.load_generator(Path("runs/g.pt"), CPU)
    assert generator.strength == 0.5 and not generator.training and info["size"] == 32


@pytest.mark.parametrize("kind", ["empty", "cut", "code", "other", "changed"])
def test_bad_checkpoints_are_one_line_and_run_no_code(kind, refused):
    state, path = models.UNet(4).state_dict(), Path("runs/last.pt")
    content = {"generator": state, "size": 32, "history": [{"width": 4}], "test_means": [0.0]}
    content |= {"changed": {"generator": {}}, "code": {"size": Path()}}.get(kind, {})
    path.parent.mkdir()
    torch.save([] if kind == "other" else content, path)
    path.write_bytes(path.read_bytes()[: {"cut": -200, "empty": 0}.get(kind)])
    for option in ("--eval runs/last.pt", "--out new --init runs/last.pt", "--resume"):
        refused(train_py, f"{TINY} {option}", "runs/last.pt: ", "PosixPath" * (kind == "code"))
    refused(train_py, "--eval runs/none.pt", "runs/none.pt: No such file")


# --- Sampling ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """A generator that has learned nothing, but colours strongly."""
    torch.manual_seed(0)
    generator, path = models.UNet(4), tmp_path_factory.mktemp("ckpt") / "g.pt"
    nn.init.normal_(generator.head.weight, 0, 1.0)
    torch.save({"generator": generator.state_dict(), "size": 32, "history": [{"width": 4}],
                "test_means": [0.0]}, path)
    return str(path)


@pytest.fixture
def sample_py(ckpt):
    """The command line of sample.py, with that generator."""
    return lambda command: sample.main(["--ckpt", ckpt, *command.split()])


def test_the_shipped_network_gives_the_readmes_figure(capsys):
    assert sample.main([str(HERE / "in"), "out", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.partition(" colorized into out, ")[2]
    assert float(said.split()[0]) == pytest.approx(16.22, abs=0.05)  # other convolutions


GREY, COLOUR = photo((50, 37), mode="L"), photo((50, 37))
EVERY_LEVEL = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32))


def pixels(image):
    """An image, or a file's, as RGB (H, W, 3) int."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    return np.asarray(image.convert("RGB")).astype(int)


def lab_of(image):
    return rgb2lab(pixels(image).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("slope, offset", [
    ((0.0, 0.0), (0.2, 0.0)), ((0.0, 0.0), (-0.2, 0.1)), ((0.3, 0.0), (0.0, 0.0))])
def test_colour_is_what_and_where_the_network_says(slope, offset, mode):
    generator = nn.Sequential(OrderedDict(head=nn.Conv2d(1, 2, 1)))  # ab is affine in L
    generator.head.weight.data[:, 0, 0, 0] = torch.tensor(slope)
    generator.head.bias.data[:] = torch.tensor(offset)
    levels = 75 + np.add.outer(np.linspace(0, 60, 48), np.linspace(0, 60, 160))  # a panorama
    image = Image.fromarray(levels.astype(np.uint8)).convert(mode)
    lab = lab_of(sample.colorize(generator, image, 16))
    assert np.abs(lab - lab_of(image))[..., 0].max() < 0.4  # 8 bits
    error = np.abs(lab[..., 1:] - ((lab[..., :1] / 50 - 1) * slope + offset) * 110)
    assert error.max() < 1.5 and error[3:-3, 5:-5].max() < 1  # bicubic edges; 8 bits


def test_strength_multiplies_the_colour_and_0_keeps_every_level_of_grey(sample_py):
    for mode in ("L", "RGB"):
        put(EVERY_LEVEL.convert(mode), f"{mode}.png")
        assert sample_py(f"{mode}.png 0 --strength 0 --grid 0") == 0
        assert np.array_equal(pixels(f"0/{mode}.png"), pixels(EVERY_LEVEL))  # rounded, not cut
    put(GREY.point(lambda level: 100 + level // 5), "a.png")  # in the gamut, whatever the colour
    for strength in (0.2, 0.4):
        assert sample_py(f"a.png {strength} --strength {strength}") == 0
    paler, pale = (lab_of(f"{folder}/a.png")[..., 1:] for folder in (0.2, 0.4))
    assert np.abs(pale).mean() > 8 and np.abs(pale - 2 * paler).max() < 3  # 8 bits, twice 8 bits


def test_a_panorama_is_seen_at_3_to_2_between_its_mirror_images():
    for size, rows in ((96, 24), 18), ((96, 64), 48), ((96, 72), 48):
        small = pixels(photo(size).resize((48, rows), Image.Resampling.BICUBIC))
        above = (48 - rows) // 2
        mirrored = np.concatenate([small[:above][::-1], small, small[::-1][:above]])
        for turn in (lambda x: x, lambda x: x.transpose(1, 0, 2)):
            seen, inside = sample.network_input(Image.fromarray(turn(np.asarray(photo(size)))), 48)
            assert np.abs(turn(seen) - mirrored).max() <= 1  # Pillow rounds rows, then columns
            assert np.abs(turn(seen[inside]) - small).max() <= 1


def test_strips_have_no_seams(ckpt, monkeypatch):
    generator, _ = models.load_generator(ckpt, CPU)
    images = [photo((90, 301), mode=mode) for mode in ("L", "RGB")]
    whole = [sample.colorize(generator, image, 32) for image in images]
    monkeypatch.setattr(sample, "STRIP", 90 * 7)
    for a, image in zip(whole, images):  # a fractional box rounds: a level now and then
        assert np.abs(pixels(a) - pixels(sample.colorize(generator, image, 32))).max() <= 1


def test_folders_are_mirrored_and_single_pictures_lie_beside(sample_py, capsys):
    put(COLOUR, "in/a.JPG", "in/b.gif", "in/d.bmp", "in/grid.png", "in/sub/a.webp",
        "in/sub-2/deep/c.tif", "e.png", "x/f.png", "x/not.png")
    put(GREY, "out/a.JPG", "out/mine.png")  # the one of an earlier run, the other not of this one
    before, mine = tree("in"), tree("out")
    # Without a grid its name is free.
    assert sample_py("e.png x/f.png in --grid 0 --overwrite e.png out") == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    order = ["e.png", "f.png", "a.JPG", "b.gif.png", "d.bmp.png", "grid.png", "sub-2/deep/c.tif",
             "sub/a.webp"]
    assert [line.split(": ")[0] for line in lines] == [f"out/{name}" for name in order]
    after = tree("out")
    assert sorted(after) == sorted(f"out/{name}" for name in (*order, "mine.png"))
    assert after["out/a.JPG"] != mine["out/a.JPG"] and after["out/mine.png"] == mine["out/mine.png"]
    assert tree("in") == before


def test_hidden_files_linked_folders_and_pipes_are_passed_over(sample_py, capsys):
    put(COLOUR, "in/a.png", "in/.hidden.png", "in/.thumbnails/b.png", "elsewhere/c.png")
    for link, target in (("link.png", "elsewhere/c.png"), ("folder", "elsewhere")):
        Path("in", link).symlink_to(Path(target).resolve())
    Path("in/gone.png").symlink_to("nowhere")
    os.mkfifo("in/pipe.png")  # whoever opened it would wait for ever
    assert sample_py("in elsewhere out --grid 0") == 0
    assert list(tree("out")) == ["out/a.png", "out/c.png", "out/link.png"]
    assert "; passed over: 2 .png, 1 linked folders\n" in capsys.readouterr().out


def test_every_picture_gets_its_line_and_the_last_one_has_the_mean(sample_py, capsys):
    for i in range(3):
        noise = np.random.RandomState(i).randint(0, 256 // (i + 1), (30, 40, 3), np.uint8)
        put(Image.fromarray(noise), f"in/{i}.png")
    put(GREY, "in/grey.png")
    put(ImageOps.colorize(GREY, (30, 15, 5), (255, 240, 200)), "in/sepia.jpg")
    Path("in/cut.png").write_bytes(Path("in/0.png").read_bytes()[:300])
    for name in ("in/empty.jpg", "in/film.mpg", "in/notes.txt"):
        Path(name).touch()
    assert sample_py("in out --grid 4") == 1
    decibels = [peak_signal_noise_ratio(pixels(f"in/{i}.png"), pixels(f"out/{i}.png"),
                                        data_range=255) for i in range(3)]
    assert abs(np.mean(decibels) - np.median(decibels)) > 0.1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        *(f"out/{i}.png: {quality:.2f} dB" for i, quality in enumerate(decibels)),
        "out/grey.png", "out/sepia.jpg",
        f"5 colorized into out, {np.mean(decibels):.2f} dB on the 3 that had colour, 2 failed"
        "; passed over: 1 .mpg, 1 .txt", "out/grid.png shows 3 of 5"]
    assert [line.split(": not colorized: ")[0] for line in err.splitlines()] == [
        "in/cut.png", "in/empty.jpg"]
    assert sample_py("in/0.png /proc/none") == 1  # no folder can be made there
    assert "/proc/none" in capsys.readouterr().err


def test_the_grid_is_bands_of_eight_columns_of_lightness_result_and_photograph(sample_py, capsys):
    names = [f"0-{'m' * 60}.png", f"1-{'m' * 60}.png"]  # a long name keeps its end
    put(EVERY_LEVEL.resize((256, 256), Image.Resampling.NEAREST), f"in/{names[0]}")
    put(photo((60, 40)), f"in/{names[1]}")
    for i in range(2, 10):
        put(Image.new("L", (30 + i, 20), 20 * i), f"in/{i}.png")
    for option, bands in (("", 1), ("--grid 9", 2)):
        assert sample_py(f"in out --overwrite {option}") == 0
        page = pixels("out/grid.png")
        # Three rows of cells, two where no picture had colour, and their names.
        assert page.shape == (798 + 540 * (bands - 1), 8 * 258, 3)
    assert "out/grid.png shows 9 of 10" in capsys.readouterr().out
    assert sample_py("in/2.png grey") == 0  # no picture had colour: two rows
    assert Image.open("grey/grid.png").size == (258, 540)
    columns = [page[i // 8 * 798 :, i % 8 * 258 :][:798, :258] for i in range(9)]
    for i, column in enumerate(columns[2:], 2):
        assert (column[128, 128] == 20 * i).all() and (column[0, :256] == 255).all()  # padded
        assert i > 7 or (column[516:774] == 255).all() and (column[774:] < 128).any()
    assert np.array_equal(columns[0][:256, :256], pixels(f"in/{names[0]}"))  # rounded, not cut
    assert np.array_equal(columns[0][774:], columns[1][774:]) and (columns[0][774:] < 128).any()
    grey, made, real = [columns[1][y : y + 256, :256] for y in (0, 258, 516)]
    for cell, folder in ((made, "out"), (real, "in")):
        image = Image.open(Path(folder, names[1]))
        image = ImageOps.pad(image, (256, 256), Image.Resampling.BICUBIC, "white")
        assert np.array_equal(cell, pixels(image))
    grey, real = rgb2lab(grey.astype(np.uint8)), rgb2lab(real.astype(np.uint8))
    assert np.abs(grey - real * (1, 0, 0)).max() < 0.3  # 8 bits


def test_two_runs_into_one_folder_write_under_names_of_their_own(sample_py, monkeypatch):
    put(COLOUR, "a.png")
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: names.append(part) or replace(part, path))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        assert sample_py("a.png out --overwrite") == 0
    assert len(set(names)) == 4 and all(path.name.startswith(".") for path in names)  # hidden


def test_odd_names(sample_py, monkeypatch):
    names = ["n" * 251 + ".png", os.fsdecode(b"caf\xe9.png"), "a b: ü.png", "\x1b[31m\n.png"]
    put(COLOUR, *(Path("in", name) for name in names))
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert sample_py("in out") == 0 and sorted(os.listdir("out")) == sorted([*names, "grid.png"])
    said = out.buffer.getvalue().decode("ascii")
    assert "out/caf\\udce9.png: " in said and "out/a b: \\xfc.png: " in said


# --- Reading pictures ----------------------------------------------------------------------------

def saved(image, format, **options):
    """A picture's file as bytes, as near to the picture as the format allows."""
    best = {"quality": 100, "lossless": True, "exact": True} if format != "tiff" else {}
    image.save(buffer := io.BytesIO(), format, **best | options)
    return buffer.getvalue()


def tiff(values, **options):
    """A TIFF's bytes, of the kinds that Pillow does not write."""
    tifffile.imwrite(buffer := io.BytesIO(), values, **options)
    return buffer.getvalue()


# ICC profiles: sRGB; values in proportion to light, of RGB and of grey.
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CURVE = SRGB.index(b"para") + 12  # (a x + b) ** g above d
LIGHT_RGB = SRGB[:CURVE] + struct.pack(">5i", 65536, 65536, 0, 65536, 0) + SRGB[CURVE + 20 :]
LIGHT_GREY = struct.pack(">I4xI4s4s4s12x4s88xI4s2I4s8x", 156, 0x02400000, b"mntr", b"GRAY",
                         b"XYZ ", b"acsp", 1, b"kTRC", 144, 12, b"curv")
LINEAR = GREY.point(  # what GREY is then; sRGB's curve without its foot, which ends below 1 / 255
    lambda level: round(255 * max(0, 1.055 * (level / 255) ** (1 / 2.4) - 0.055)))
GAMA, XMP = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
GAMA.add(b"gAMA", struct.pack(">I", 45455))  # sRGB's
XMP.add_itxt("XML:com.adobe.xmp", PACKET := "<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
MASK = photo((50, 37), seed=5, mode="L").point(lambda level: max(0, level - 110))
SEEN = Image.fromarray(np.asarray(MASK) > 0)
CUT_OUT = Image.merge("RGBA", (*COLOUR.split(), MASK))
on_white = lambda image, seen: Image.composite(image, image.point(lambda level: 255), seen)
ON_WHITE = on_white(COLOUR, SEEN)  # hidden pixels are white, and steer nothing
CMYK, PALETTE = COLOUR.convert("CMYK"), COLOUR.quantize(16)
SIXTEEN = PALETTE.convert("RGB")
KEY = Image.fromarray(np.where(np.asarray(PALETTE) == 3, 0, 255).astype(np.uint8))
FLAT, DEEP_RGB = (np.asarray(image).astype(np.uint16) * 257 for image in (GREY, COLOUR))
DEEP = (FLAT + np.where(FLAT > 32768, 120, -120)).astype(np.uint16)  # nearest to GREY all the same
PLANES, PLANAR = np.moveaxis(DEEP_RGB, 2, 0), {"photometric": "rgb", "planarconfig": "separate"}
PAGES = {"save_all": True, "append_images": [MASK]}

PICTURES = {  # name: its file, how it is to be seen, its alpha if any
    **{f"grey.{kind}": (saved(GREY, kind), GREY) for kind in ("png", "bmp", "jpeg", "webp", "ppm")},
    "rgb.png": (saved(COLOUR, "png"), COLOUR), "rgb.jpg": (saved(COLOUR, "jpeg"), COLOUR),
    "opaque.png": (saved(COLOUR.convert("RGBA"), "png"), COLOUR),  # it hides nothing: no alpha
    "bit.png": (saved(GREY.convert("1"), "png"), GREY.convert("1")),
    "white-is-0.tif": (tiff(255 - np.asarray(GREY), photometric="miniswhite"), GREY),
    "16-bit.png": (saved(Image.fromarray(DEEP), "png"), GREY),
    "16-bit.tif": (tiff(DEEP), GREY), "16-bit-big.tif": (tiff(DEEP, byteorder=">"), GREY),
    "16-bit.pgm": (b"P5 50 37 65535\n" + DEEP.astype(">u2").tobytes(), GREY),
    "16-bit-rgb.tif": (tiff(DEEP_RGB, photometric="rgb", subfiletype=2), COLOUR),  # a page
    "planar-16.tif": (tiff(PLANES, compression="zlib", **PLANAR), COLOUR),
    "palette.png": (saved(PALETTE, "png"), SIXTEEN),
    "cmyk.tif": (saved(CMYK, "tiff"), COLOUR), "cmyk.jpg": (saved(CMYK, "jpeg"), COLOUR),
    **{f"pages.{kind}": (saved(GREY, kind, **PAGES), GREY) for kind in ("tiff", "gif", "mpo")},
    "grey-icc.png": (saved(GREY, "png", icc_profile=LIGHT_GREY), LINEAR),
    "grey-icc-gama.png": (saved(GREY, "png", icc_profile=LIGHT_GREY, pnginfo=GAMA), LINEAR),
    "16-bit-icc.png": (saved(Image.fromarray(FLAT), "png", icc_profile=LIGHT_GREY), LINEAR),
    "icc.jpg": (saved(GREY.convert("RGB"), "jpeg", icc_profile=LIGHT_RGB), LINEAR.convert("RGB")),
    "other-mode.png": (saved(GREY, "png", icc_profile=LIGHT_RGB), GREY),
    "other-mode.tif": (saved(CMYK, "tiff", icc_profile=LIGHT_RGB), COLOUR),
    "broken-profile.png": (saved(GREY, "png", icc_profile=b"broken"), GREY),
    "grey-alpha.png": (saved(Image.merge("LA", (GREY, MASK)), "png"), on_white(GREY, SEEN), MASK),
    **{f"alpha.{kind}": (saved(CUT_OUT, kind), ON_WHITE, MASK) for kind in ("png", "webp")},
    "key.png": (saved(PALETTE, "png", transparency=3), on_white(SIXTEEN, KEY), KEY),
    **{f"{w}-{h}.png": (saved(GREY.resize((w, h)), "png"), GREY.resize((w, h)))
       for w, h in ((1, 1), (1, 300), (900, 2))},
}
UPRIGHT = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270",
           "TRANSVERSE", "ROTATE_90")  # of EXIF's orientations from 2
for kind, image, *seen in (
        ("rgb.jpeg", COLOUR, COLOUR), ("rgb.png", COLOUR, COLOUR), ("grey.tiff", GREY, GREY),
        ("16-bit.tiff", Image.fromarray(DEEP), GREY), ("alpha.tiff", CUT_OUT, ON_WHITE, MASK),
        ("cmyk.tiff", CMYK, COLOUR), ("palette.tiff", PALETTE, SIXTEEN)):
    for number, turn in enumerate(UPRIGHT, 2):
        made = Image.Exif()
        made[0x0112] = number
        PICTURES[f"turned-{number}-{kind}"] = (
            saved(image, kind.split(".")[1], exif=made),
            *(part.transpose(Image.Transpose[turn]) for part in seen))


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_read_right_and_keeps_its_lightness(name, sample_py):
    blob, expected, *alpha = PICTURES[name]
    Path(name).write_bytes(blob)
    # JPEG loses a little; colour management works in tables of 8 bits, coarse in the shadows.
    loss = 3 if name.endswith(("jpg", "jpeg", "mpo")) else 2.5 if "icc" in name else 0
    read = data.read_picture(name).image
    assert np.abs(lab_of(read) - lab_of(expected))[..., 0].max() <= loss
    assert loss or np.array_equal(pixels(read), pixels(expected))
    assert sample_py(f"{name} out --grid 0") == 0
    (path,) = Path("out").iterdir()
    assert path.name == (name if path.suffix == Path(name).suffix else f"{name}.png")
    result = Image.open(path)
    assert result.size == expected.size and result.getexif().get(0x0112, 1) == 1
    assert result.format == Image.registered_extensions()[path.suffix]
    if result.format == "JPEG":  # quality 95, colour at full resolution
        best = Image.open(io.BytesIO(saved(COLOUR, "jpeg", quality=95, subsampling=0)))
        assert result.quantization == best.quantization and result.layer == best.layer
    # 8 bits: a rounded RGB is at most half a level off in each channel, 0.6 of L* near black.
    visible = np.asarray(*alpha) > 0 if alpha else ...
    difference = lab_of(result)[visible] - lab_of(expected)[visible]
    assert np.abs(difference)[..., 0].max() < loss + 0.7
    assert not alpha or (pixels(result)[~visible] == 255).all()
    if name not in ("1-1.png", "bit.png"):  # black and white have no colour
        assert np.ptp(pixels(result), axis=2).max() > 8
    assert result.has_transparency_data == bool(alpha)
    assert not alpha or np.array_equal(result.convert("RGBA").getchannel("A"), *alpha)
    small = read.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)  # training sees it so
    assert np.array_equal(data.decode(Path(), 16, name), small)


RAMP = np.linspace(-3, 9, 50 * 37, dtype=np.float32).reshape(37, 50)
DEPTH = [struct.pack("<2HI2H", 258, 3, 1, bits, 0) for bits in (16, 12)]  # TIFF's tag of 16 or 12
REFUSED = {  # name: its file, what is said
    "32-bit.tif": (tiff(FLAT.astype(np.uint32) * 65537), "32 bits a channel"),
    "float.tif": (tiff(RAMP), "floating point"),
    "float.pfm": (b"Pf\n50 37\n-1.0\n" + RAMP.tobytes(), "floating point"),
    "signed.tif": (tiff(np.asarray(GREY).astype(np.int8)), "signed values"),
    "white-is-0.tif": (tiff(FLAT, photometric="miniswhite"), "0 is white"),
    "cut-out-16.png": (saved(Image.fromarray(FLAT), "png", transparency=5), "transparent level"),
    "12-bit.tif": (tiff(FLAT).replace(*DEPTH), "neither 8 nor 16 bits"),
    "planar-16.tif": (tiff(PLANES, **PLANAR), "16 bits in planes"),
    "preview.tif": (tiff(np.asarray(GREY), subfiletype=3), "its first page is a preview"),
    **{f"cut.{kind}": (saved(COLOUR, kind)[:-300], "truncated") for kind in ("png", "jpeg")},
    "huge.ppm": (b"P6 60000 60000 255\n", "limit"),
    "empty.png": (b"", "save it as JPEG or PNG"), "text.png": (b"no", "save it as JPEG or PNG"),
    "alpha.jpg": (saved(CUT_OUT, "png"), "cannot write mode RGBA as JPEG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_that_would_come_out_wrong_is_refused_by_name(name, sample_py, capsys):
    blob, said = REFUSED[name]
    Path(name).write_bytes(blob)
    path = Path("out", name if Path(name).suffix in sample.SAVE else f"{name}.png")
    put(GREY, path)  # of an earlier run: it stays
    before = tree()
    assert sample_py(f"{name} out --overwrite") == 1 and tree() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: not colorized: ") and said in line
    assert "alpha" in name or not data.decode(Path(), 16, name).any()  # nor trained on


@pytest.mark.parametrize("suffix, options", [
    ("jpg", {}), ("png", {"pnginfo": XMP}), ("webp", {"xmp": PACKET.encode()}), ("tif", {})])
def test_exif_and_resolution_are_kept_and_the_orientation_is_used_up(suffix, options, sample_py):
    tags = {270: "Vera's roses", 0x0112: 6, 0x8769: {0x9003: "1921:05:04 03:02:01"},
            0x8825: {1: "N", 2: (51.0, 30.0, 0.0)}}  # the place, by GPS
    exif = Image.Exif()
    exif.update(tags)
    COLOUR.save(f"a.{suffix}", dpi=(300, 300), exif=exif.tobytes(), **options)
    COLOUR.save(f"b.{suffix}")
    assert sample_py(f"a.{suffix} b.{suffix} out --grid 0") == 0
    image, bare = (Image.open(f"out/{name}.{suffix}") for name in "ab")
    found = image.getexif()
    assert image.size == (37, 50) and found.get(0x0112, 1) == 1
    assert 282 not in bare.getexif()  # x dpi
    if suffix != "tif":
        assert found[270] == tags[270]
        assert all(found.get_ifd(tag) == tags[tag] for tag in (0x8769, 0x8825))
    assert suffix == "webp" or image.info["dpi"] == pytest.approx((300, 300), abs=0.01)  # PNG: /m
    assert b"xmpmeta" not in Path(f"out/a.{suffix}").read_bytes()  # it may turn the picture again


# --- Files ---------------------------------------------------------------------------------------

def test_the_cache_serves_until_a_file_changes_and_is_never_written_to():
    folder, contents = make_photos("photos"), []
    for seed, size, time_ns in ((98, 32, 10**18), (97, 32, 10**18), (97, 32, 2 * 10**18),
                                (97, 48, 2 * 10**18), (97, 32, 2 * 10**18)):
        photo(seed=seed).save(folder / "new.bmp")  # not compressed: sizes are equal
        os.utime(folder / "new.bmp", ns=(time_ns, time_ns))
        photos = data.Photos(folder, size)
        contents.append(photos.contents)
        photos.images[:] = 0  # in memory alone
    assert contents[0] == contents[1] != contents[2] == contents[4] != contents[3]
    assert len(tree("cache")) == 3 and not any(map(data.is_picture, tree("cache")))


def test_what_cannot_be_read_and_too_much_grey_are_named(capsys):
    make_photos("photos")
    Path("photos/cut.png").write_bytes(Path("photos/a/00.png").read_bytes()[:-300])
    for grey in range(4):
        if grey:
            photo(seed=50 + grey, mode="L").save(f"photos/{grey}.png")
        for _ in range(2):  # also when the cache is there
            photos = data.Photos("photos", 32)
            out = capsys.readouterr().out
            assert f"1 of {21 + grey} images left out" in out and "again): cut.png\n" in out
            assert (f"warning: {grey} of {20 + grey} images are black and white" in out) == (
                grey == 3)  # more than a tenth
    assert sum(map(len, (photos.train, photos.val, photos.test))) == 23
    for count, draw, said in ((9, photo, "9 readable"), (10, lambda seed: photo(), "identical")):
        with pytest.raises(data.UsageError, match=said):
            data.Photos(make_photos(said, count, draw), 32)


def test_a_full_disk_is_one_line_and_leaves_nothing(refused, capsys):
    make_photos("photos")
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
    try:  # a limit of a file's size fails like a full disk, in g.pt and in the cache
        assert train_py(PRE) == 1 and "runs/last.pt (is there room?)" in capsys.readouterr().err
        refused(train_py, f"{PRE} --size 64 --out new", "cannot write cache/", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not any(".part" in path for path in tree())


def test_only_the_default_folder_is_downloaded(monkeypatch):
    from torchvision.datasets import Flowers102
    answers = ["no route to host"]
    def fetch(self, root, download):
        make_photos(root / "flowers-102" / "jpg")
        if answers:
            raise RuntimeError(answers.pop())
    monkeypatch.setattr(Flowers102, "__init__", fetch)
    with pytest.raises(data.UsageError, match="no route to host.*by hand.*--data demo"):
        data.Photos("data", 32)
    assert Path("data.part").exists() and not Path("data").exists()
    assert len(data.Photos("data", 32).images) == 20 and not Path("data.part").exists()
    assert len(data.Photos("demo", 32).images) == 428


# --- Mistakes of the command line ----------------------------------------------------------------

@pytest.mark.parametrize("command", (
    "--size 100, --size 16, --size 1000000, --size big, --width 0, --width 10000, --batch-size 0, "
    f"--batch-size 2.5, --batch-size {'9' * 401}, {TINY} --batch-size 15, --epochs -1, "
    "--pretrain-epochs -1, --pretrain-epochs 0 --epochs 0, --critic-steps 0, --generator-steps 0, "
    "--lambda-l1 -1, --lambda-gp nan, --lr -1, --lr inf, --pretrain-lr fast, --aged 1.5, "
    "--aged nan, --ema 1.5, --amp fp8, --device gpu, --device hpu, --device cuda:99, --seed -1, "
    f"--sample-every 0, --data file, --data absent, {TINY} --out file, --frobnicate, --epochs, "
    "--data photos --out photos/runs, --data photos --eval g.pt --out photos/runs").split(", "))
def test_train_mistakes_are_one_line_that_names_the_last_option(command, refused):
    data.Photos(make_photos("photos"), 32)  # into the cache
    Path("file").touch()
    refused(train_py, command, [word for word in command.split() if word.startswith("--")][-1])


@pytest.mark.parametrize("command, named", [
    ("missing out", ["input missing", "no such file"]), ("in", ["out"]), ("in in", ["out in"]),
    ("in again/../in/out", ["out again/../in/out"]), ("in/a/00.png in/a", ["out in/a"]),
    ("ph/b ph --grid 0", ["out ph: would", "ph/b/x.png"]), ("in file", ["out file", "folder"]),
    ("in/a/00.png b.BMP", ["out b.BMP", "folder"]), ("photo.heic out", ["photo.heic", "as JPEG"]),
    ("none out", ["input none: no pic"]),
    ("in/a/00.png again/00.png out", ["again/00.png", "in/a/00.png", "their parent folder"]),
    ("two out", ["two/a.gif", "out/a.gif.png", "rename one"]),
    ("again out", ["again/grid.png", "--grid 0"]), ("again/grid.png out", ["--grid 0"]),
    ("in out --ckpt none.pt", ["none.pt", "No such file"]), ("in out --ckpt file", ["file"]),
    *((f"in out {option}", [option.split()[0]]) for option in (
        "--device gpu", "--size 3", "--grid -1", "--strength -1", "--strength 11"))])
def test_mistakes_of_sample_py_are_one_line(command, named, sample_py, refused):
    make_photos("in", 2)
    put(GREY, "again/00.png", "again/grid.png", "two/a.gif", "two/a.gif.png",
        "ph/b/x.png", "ph/b/b/x.png")
    for name in ("file", "photo.heic", "none/photo.heic"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    refused(sample_py, command, *named)


# --- Slow: processes, and mutated pictures -------------------------------------------------------

def test_a_run_that_is_killed_or_stopped_resumes_exactly():
    make_photos("photos")
    command = f"{TINY} --pretrain-epochs 2 --resume"
    for options in ("8 --out whole", "0 --out stopped", "1 --out stopped"):  # at a change of phase,
        assert train_py(f"{command} --epochs {options}") == 0  # and within the second
    last, command = Path("stopped/last.pt"), f"{command} --epochs 8 --out stopped"
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = last.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, HERE / "train.py", *command.split()],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and last.stat().st_mtime_ns == before:
            time.sleep(0.01)
        process.send_signal(number)
        said = "" if status < 0 else "stopped; --resume goes on from stopped's last save, if any\n"
        assert (process.communicate()[1], process.returncode) == (said, status)
    assert train_py(command) == 0
    whole, stopped = (torch.load(f"{out}/last.pt") for out in ("whole", "stopped"))
    for name in ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler"):
        assert_identical(whole[name], stopped[name])
    whole, stopped = ([r | {"images_per_s": 0} for r in read_log(x)] for x in ("whole", "stopped"))
    assert whole == stopped and len(whole) == 10


WORKER = """
import sys, torch, torch.distributed as dist, data, train
rows, batch = [], data.Photos.batch
def spy(photos, chosen, crop=False, aged=0.0):
    if crop:
        rows.append((chosen.tolist(), torch.initial_seed()))
    return batch(photos, chosen, crop, aged)
class Run(train.Run):
    def check_finite(self, means, epoch):
        train.average(mean := [dist.get_rank() * x for x in (torch.ones(2), torch.eye(2, 3).T)])
        weights = [[*x.parameters()] for x in (self.generator, self.critic, self.ema)]
        torch.save([weights, means, mean, rows], f"{dist.get_rank()}.pt")
data.Photos.batch, train.Run = spy, Run
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_share_each_batch_and_stay_bit_identical(refused):
    make_photos("photos")
    Path("worker.py").write_text(WORKER)
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 worker.py {PRE} --epochs 1"
    result = subprocess.run([sys.executable, *command.split(), "--batch-size", "14"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (*a, mean, rows_a), (*b, _, rows_b) = (torch.load(f"{rank}.pt") for rank in "01")
    assert_identical([*a, mean], [*b, [torch.full((2,), 0.5), torch.eye(3, 2) / 2]])
    assert len(rows_a) == 2
    for epoch, ((mine, seed), (theirs, other)) in enumerate(zip(rows_a, rows_b)):
        rows = data.Photos("photos", 32).train[np.random.default_rng([0, epoch]).permutation(14)]
        assert sorted(mine + theirs) == sorted(rows.tolist()) and len(mine) == 7
        assert seed != other  # other crops and mixes
    assert result.stdout.count("epoch 2 ") == result.stdout.count("decoded into") == 1
    refused(train_py, f"{PRE} --epochs 1 --batch-size 14 --resume", "nproc-per-node 1", "has 2")


def test_ctrl_c_leaves_whole_pictures_and_skip_existing_goes_on(ckpt, sample_py, capsys):
    make_photos("in", 150)
    process = subprocess.Popen(
        [sys.executable, HERE / "sample.py", "--ckpt", ckpt, "--device", "cpu", "in", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("out/a/00.png: ")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert (process.returncode, error) == (130, "stopped; --skip-existing goes on\n")
    before = tree("out")
    assert 0 < len(before) < 150 and all(Image.open(path).load() for path in before)
    assert sample_py("in out --skip-existing --grid 0") == 0
    out = capsys.readouterr().out
    assert f"{150 - len(before)} colorized " in out and f"{len(before)} done before" in out
    assert len(tree("out")) == 150 and before.items() < tree("out").items()


def test_mutated_files_are_colorized_or_named(sample_py, capsys):
    rng, count = random.Random(0), int(os.environ.get("MUTATIONS", 300))
    files = {kind: saved(COLOUR, kind) for kind in ("png", "jpeg", "tiff", "bmp", "webp", "gif")}
    names = [f"{i:05}.{rng.choice(list(files))}" for i in range(count)]
    Path("in").mkdir()
    for name in names:
        blob, other = bytearray(files[name[6:]]), rng.choice(list(files.values()))
        place, start = rng.randrange(len(blob)), rng.randrange(len(other))
        for _ in range(rng.choice((1, 4, 30))):
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        tail = rng.choice((blob[place:], b"", other[start:]))  # only flipped; cut; spliced
        Path("in", name).write_bytes(blob[:place] + tail)
    assert sample_py("in out --grid 0") == 1
    named = [line.split(": ")[0][3:] for line in capsys.readouterr().err.splitlines()]
    written = [name.removesuffix(".png") if name.count(".") == 2 else name
               for name in os.listdir("out")]
    assert sorted(named + written) == names
    assert min(len(named), len(written)) > count / 10

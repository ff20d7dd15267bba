"""Train the colorizer: L1 pre-training, then WGAN-GP; or evaluate checkpoints.

    python train.py --epochs 110 --size 128
    torchrun --nproc-per-node 2 train.py --epochs 110 --size 128
    python train.py --eval g.pt

Isola et al. 2018, pix2pix (arXiv:1611.07004): the patch critic, and L1 beside it. Gulrajani et al.
2017, Improved Training of Wasserstein GANs (arXiv:1704.00028): the loss and its penalty.
"""
import copy
import csv
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from skimage.metrics import structural_similarity
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import save_image

from data import (
    DEFAULT_DATA, Parser, Photos, UsageError, denormalize, lab_to_rgb, live, number, replacing,
    rgb_to_lab, run_command, say)
from models import PatchCritic, UNet, load_generator, loading, pick_device, to_device

# A save writes 642 MB at width 64: short epochs do not each end in one.
SAVE_SECONDS = 30


# --- METHOD: losses ------------------------------------------------------------------------------

def score(critic, L, ab):
    """One score an image, (N,): the mean of the critic's map.

    L: (N, 1, H, W), ab: (N, 2, H, W), both in [-1, 1]. The losses and the penalty must use the same
    mean: a sum's gradient is larger by the number of patches.
    """
    return critic(torch.cat([L, ab], 1)).float().mean((1, 2, 3))


def generator_loss(l1, fake_score, lambda_l1):
    """lambda_l1 * L1 - E[score of the colorized]: near the photograph, and real to the critic.

    l1: mean absolute error of ab / 110; fake_score: (N,).
    """
    return lambda_l1 * l1 - fake_score.mean()


def critic_loss(real_score, fake_score):
    """E[score of the colorized] - E[score of the real] (Gulrajani et al. 2017, eq. 3, first part).

    Minus this is the critic's estimate of the Wasserstein distance.
    """
    return fake_score.mean() - real_score.mean()


def gradient_penalty(critic, L, real_ab, fake_ab):
    """E[(||d score / d ab|| - 1)^2] between real and colorized (Gulrajani et al. 2017, eq. 3).

    L: (N, 1, H, W); real_ab, fake_ab: (N, 2, H, W). Real and colorized are mixed, image by image,
    in a random proportion, and the norm is over all of an image's gradient. Both share L, so the
    line between them runs in ab alone, and the gradient is taken there.
    """
    # Outside autocast: 16 bits lose too much of a gradient of a gradient.
    with torch.autocast(L.device.type, enabled=False):
        epsilon = torch.rand(len(L), 1, 1, 1, device=L.device)
        mixed = torch.lerp(fake_ab.float(), real_ab, epsilon).requires_grad_()
        # An image's score depends on that image alone (instance norm), so the gradient of the sum
        # over the batch holds, image by image, the gradient of each one's own score.
        total = score(critic, L, mixed).sum()
        (gradient,) = torch.autograd.grad(total, mixed, create_graph=True)
        # vector_norm, since its gradient at 0 is 0, where that of sqrt(sum(g ** 2)) is NaN.
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return ((norm - 1) ** 2).mean()


# --- METHOD: one step ----------------------------------------------------------------------------

def pretrain_step(run, L, ab):
    """One L1 step of the generator. Returns its terms."""
    with run.autocast():
        l1 = F.l1_loss(run.generator(L), ab)
    update(run.generator, run.optimizer_g, l1, run.scaler)
    return {"l1": l1.detach()}


def adversarial_step(run, L, ab):
    """Critic steps, then generator steps, on one batch. Returns the terms of the last ones."""
    args = run.args
    with run.autocast():
        fake_ab = run.generator(L)

    # The critic learns to tell them apart. Detached: its step must not reach the generator.
    fixed_ab = fake_ab.detach()
    for _ in range(args.critic_steps):
        with run.autocast():
            loss_c = critic_loss(score(run.critic, L, ab), score(run.critic, L, fixed_ab))
        penalty = gradient_penalty(run.critic, L, ab, fixed_ab)
        # One backward for both: the penalty alone gives the last bias no gradient to average.
        update(run.critic, run.optimizer_c, loss_c + args.lambda_gp * penalty, run.scaler)

    # The generator learns to please it. The critic is held fixed, without gradients of its own. The
    # first step uses fake_ab from above again: the generator has not changed since.
    run.critic.requires_grad_(False)
    for i in range(args.generator_steps):
        with run.autocast():
            if i > 0:
                fake_ab = run.generator(L)
            l1 = F.l1_loss(fake_ab, ab)
            fake_score = score(run.critic, L, fake_ab)
            loss_g = generator_loss(l1, fake_score, args.lambda_l1)
        update(run.generator, run.optimizer_g, loss_g, run.scaler)
    run.critic.requires_grad_(True)

    return {
        "l1": l1.detach(),
        "adversarial": -fake_score.detach().mean(),
        "wasserstein": -loss_c.detach(),
        "penalty": penalty.detach(),
    }


def update(network, optimizer, loss, scaler):
    """Step one network down the gradient of a loss.

    The scaler, which is enabled for float16 alone, leaves out the step where that overflows.
    """
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    average([p.grad for p in network.parameters()])
    scaler.step(optimizer)
    scaler.update()


def average(tensors):
    """Average a list of tensors, in place, over the processes of torchrun.

    By hand: DistributedDataParallel does not support autograd.grad, which the penalty needs.
    """
    if not dist.is_initialized():
        return
    # In each call to all_reduce all processes wait for each other: let one call do.
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, flat.split(sizes)):
        tensor.copy_(mean.view_as(tensor))


def update_ema(ema, generator, updates, decay):
    """Move ema, batch-norm statistics included, towards generator, in place.

    updates: how many came before. The decay warms up from 0.1 (TensorFlow's way), so that a short
    run forgets its first weights, too.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    averages = floating_point(ema.state_dict())
    values = floating_point(generator.state_dict())
    # Where None is, it takes a count that it does not use.
    get_ema_multi_avg_fn(decay)(averages, values, None)


def floating_point(state):
    """The tensors of a state_dict that can be averaged: all but counters."""
    return [tensor for tensor in state.values() if tensor.is_floating_point()]


def learning_rate(args, epoch):
    """Learning rate at a time counted in epochs, fractions included."""
    # 1) adversarial phase: constant, so that a longer run begins like a shorter one
    if epoch >= args.pretrain_epochs:
        return args.lr
    # 2) the first tenth of pre-training: linear warm-up
    done = epoch / args.pretrain_epochs
    if done < 0.1:
        return args.pretrain_lr * done / 0.1
    # 3) the rest of it: half a cosine, down to 0 (Loshchilov and Hutter 2017)
    return args.pretrain_lr * (0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))


# --- METHOD: the loop ----------------------------------------------------------------------------

def train(run, photos, rank):
    """Train to the last epoch; the process of rank 0 evaluates, logs, draws and saves."""
    args = run.args
    total = args.pretrain_epochs + args.epochs
    steps = len(photos.train) // args.batch_size
    saved = -math.inf
    for epoch in range(run.epoch, total):
        # Keep what L1 has reached, to show what the critic adds; but no untrained weights.
        if rank == 0 and epoch == args.pretrain_epochs:
            if epoch > 0 or run.history:
                run.save_generator("pretrained.pt", photos)

        # All that is random follows from (seed, epoch), so --resume needs no random state. The
        # order is that of all processes; their crops, ageing and mixes differ.
        rng = np.random.default_rng([args.seed, epoch])
        batches = photos.train[rng.permutation(len(photos.train))].split(args.batch_size)
        torch.manual_seed(int(rng.integers(2**32)) + rank)

        terms = []
        began = time.perf_counter()
        for i in range(steps):
            # The rate is that of the step's middle.
            lr = learning_rate(args, epoch + (i + 0.5) / steps)
            run.optimizer_g.param_groups[0]["lr"] = lr
            run.optimizer_c.param_groups[0]["lr"] = lr

            # Every process takes its share of the batch.
            rows = batches[i][rank :: args.nproc_per_node]
            L, ab = photos.batch(rows, crop=True, aged=args.aged)
            if epoch < args.pretrain_epochs:
                terms.append(pretrain_step(run, L, ab))
            else:
                terms.append(adversarial_step(run, L, ab))
            update_ema(run.ema, run.generator, epoch * steps + i, args.ema)

            if rank == 0:
                live(f"epoch {epoch + 1}/{total}, step {i + 1}/{steps}")

        # The terms stay on the device until here, so that no step waits for them.
        means = {}
        for name in terms[0]:
            means[name] = torch.stack([term[name] for term in terms]).mean()
        average(list(means.values()))
        means = {name: mean.item() for name, mean in means.items()}
        speed = steps * args.batch_size / (time.perf_counter() - began)
        run.check_finite(means, epoch)

        run.epoch = epoch + 1
        if rank == 0:
            log_epoch(run, photos, means, speed)
            last = run.epoch == total
            if last or run.epoch % args.sample_every == 0:
                draw([run.ema], photos, photos.val[:8], args.out / f"epoch-{run.epoch:04}.png")
            if last or time.monotonic() - saved >= SAVE_SECONDS:
                run.save(photos)
                saved = time.monotonic()


def log_epoch(run, photos, means, speed):
    """Evaluate the validation part, clean and aged; log and print it with the epoch's means."""
    figures = measure(run.ema, photos, photos.val)
    figures["aged_psnr"] = measure(run.ema, photos, photos.val, aged=1.0)["psnr"]
    val = {f"val_{name}": figure.mean().item() for name, figure in figures.items()}
    phase = "pretrain" if run.epoch <= run.args.pretrain_epochs else "wgan-gp"
    run.log.append({"epoch": run.epoch, "phase": phase, "images_per_s": speed, **val, **means})
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    say(f"epoch {run.epoch} {phase}  {losses}  val {val['val_psnr']:.2f} dB, aged "
        f"{val['val_aged_psnr']:.2f} dB, colourfulness {val['val_colourfulness']:.1f}  "
        f"{speed:.1f} images/s")


# --- HOUSEKEEPING: evaluation --------------------------------------------------------------------

def to_uint8(L, ab):
    """L and ab as networks see them, to RGB (N, 3, H, W) uint8, clipped as scikit-image does."""
    return (lab_to_rgb(denormalize(L, ab)) * 255).round().byte()


def psnr(fake, real):
    """Peak signal-to-noise ratio in dB, at most 100. (N, 3, H, W) uint8, both; returns (N,)."""
    difference = fake.float() - real.float()
    error = difference.square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error)).clamp_max(100)


def ssim(fake, real):
    """Likeness of structure, by scikit-image. (N, 3, H, W) uint8, both; returns (N,)."""
    pairs = zip(fake.cpu().numpy(), real.cpu().numpy())
    return torch.tensor([structural_similarity(*pair, channel_axis=0) for pair in pairs])


def colourfulness(images):
    """Colourfulness of pictures (N, 3, H, W) uint8: Hasler and Suesstrunk 2003, section 5.

    Returns (N,): 0 is grey, 109 extremely colourful.
    """
    # Red against green, and yellow against blue.
    r, g, b = images.float().flatten(2).unbind(1)
    opponents = torch.stack([r - g, (r + g) / 2 - b])
    deviation, mean = torch.std_mean(opponents, 2)
    return torch.hypot(*deviation) + 0.3 * torch.hypot(*mean)


def ab_histogram(images):
    """Share of each image's pixels in cells of 10 x 10 of a, b: (N, 3, H, W) uint8 to (N, 529)."""
    # -110 to 110 become 0 to 22, the row and the column of a pixel's cell.
    ab = rgb_to_lab(images / 255)[:, 1:]
    a, b = (ab / 10 + 11).round().long().flatten(2).unbind(1)
    counts = [torch.bincount(cells, minlength=23 * 23) for cells in 23 * a + b]
    return torch.stack(counts) / a.shape[1]


def chunks(photos, rows):
    """Rows in pieces that take as much memory as 64 images of 128 x 128."""
    return rows.split(max(1, 64 * 128**2 // photos.size**2))


@torch.no_grad()
def measure(predict, photos, rows, aged=0.0, full=False):
    """Figures of every image: a dict of tensors, a row an image.

    predict: a generator, or what takes L (N, 1, H, W) and returns ab (N, 2, H, W) like one.
    aged: the share of images that predict sees aged (on one kind of device always in the same way);
    its colours are joined with the photograph's own L. full: also SSIM, the photograph's
    colourfulness, and excess, each cell's share of pixels (ab_histogram) minus the photograph's.
    """
    # The ageing is the same every time; train() seeds each epoch anew.
    torch.manual_seed(0)
    parts = []
    for chunk in chunks(photos, rows):
        L, ab = photos.batch(chunk)
        seen = L
        if aged:
            seen, _ = photos.batch(chunk, aged=aged)
        fake = to_uint8(L, predict(seen))
        real = to_uint8(L, ab)
        figures = {"psnr": psnr(fake, real), "colourfulness": colourfulness(fake)}
        if full:
            figures["ssim"] = ssim(fake, real)
            figures["real_colourfulness"] = colourfulness(real)
            figures["excess"] = ab_histogram(fake) - ab_histogram(real)
        parts.append(figures)

    joined = {}
    for name in parts[0]:
        joined[name] = torch.cat([part[name] for part in parts]).cpu()
    return joined


@torch.no_grad()
def draw(generators, photos, rows, path):
    """Draw the images of these rows below each other: grey, colorized by each, and real."""
    L, ab = photos.batch(rows)
    colours = [torch.zeros_like(ab), *(generator(L) for generator in generators), ab]
    images = torch.cat([to_uint8(L, colour) for colour in colours]).cpu() / 255
    with replacing(path) as part:
        save_image(images, part, nrow=len(rows), format="png")


def report(generators, photos, out=None):
    """Print the table of generators on the test part; keep it, and eight pictures, in out if given.

    generators: a dict {name: (generator, info)}, as load_generator returns them.
    """
    rows = [("no colour", no_colour, 0.0)]
    for name, (generator, _) in generators.items():
        rows.append((name, generator, 0.0))
        rows.append((f"{name}, aged photographs", generator, 1.0))

    # Every row is compared with no colour, image by image.
    lines = describe(generators, photos)
    title = f"{len(photos.test)} test images at {photos.size} x {photos.size}"
    column = max(len(title), *(len(name) for name, _, _ in rows)) + 2
    lines.append(f"{title:{column}} PSNR dB   SSIM  colourfulness  mix error  worse than no colour")
    grey = measure(no_colour, photos, photos.test)["psnr"]
    for name, predict, aged in rows:
        live(f"evaluating: {name}")
        figures = measure(predict, photos, photos.test, aged=aged, full=True)
        mean = {key: figure.mean().item() for key, figure in figures.items()}
        # The total variation distance of the two histograms of all pixels.
        mix_error = figures["excess"].mean(0).clamp_min(0).sum()
        worse = (figures["psnr"] < grey).float().mean()
        lines.append(f"{name:{column}} {mean['psnr']:7.2f}  {mean['ssim']:.3f}  "
                     f"{mean['colourfulness']:13.1f}  {mix_error:9.0%}  {worse:20.0%}")
    lines.append(f"{'real':{column}} {mean['real_colourfulness']:29.1f}")

    for line in lines:
        say(line)
    if out:
        with replacing(out / "test.txt") as part:
            part.write_text("\n".join(lines) + "\n", errors="backslashreplace")
        networks, _ = zip(*generators.values())
        draw(networks, photos, photos.test[:8], out / "test.png")


def describe(generators, photos):
    """Lines on generators, as report gets them: how each was made, and a warning of other photos.

    Of each run that led to one, its last epoch and the options that differ from the line before.
    """
    lines, runs = [], []
    options = {}
    for name, (_, info) in generators.items():
        known = True
        for run in info["history"]:
            # Those of the last run stand beside the history.
            means = run.pop("test_means", info["test_means"])
            known &= same_test_part(means, photos.test_means)
            if run not in runs:
                new = [f"{key} {value}" for key, value in run.items()
                       if key == "epoch" or options.get(key) != value]
                lines.append(f"{name}: " + ", ".join(new))
                runs.append(run)
                options = run
        if not known:
            lines.append(f"warning: {name}, or what it began from, was made with other images: "
                         "those it was trained on may be among the ones tested here")
    return lines


def no_colour(L):
    """A generator of grey pictures: ab = 0, (N, 2, H, W) for L (N, 1, H, W)."""
    return torch.zeros_like(L).expand(-1, 2, -1, -1)


def same_test_part(ours, theirs):
    """Whether two lists of mean levels (0 to 255) are of the same images, however read."""
    return len(ours) == len(theirs) and np.abs(np.subtract(ours, theirs)).mean() < 2


# --- HOUSEKEEPING: the state of a run, and its checkpoints ---------------------------------------

class Run:
    """All that training changes: networks, optimizers, moving average, scaler, epoch and log."""

    STATEFUL = ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler")
    MAY_DIFFER = ("data", "device", "epochs", "eval", "init", "out", "resume", "sample_every")

    def __init__(self, args, device):
        self.args = args
        self.device = device
        # The same seed begins with the same networks, on all processes.
        torch.manual_seed(args.seed)
        self.generator = to_device(UNet(args.width), device)
        self.critic = to_device(PatchCritic(args.width), device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        # Adam's beta1 is pix2pix's, beta2 WGAN-GP's, whose beta1 is 0.
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), betas=(0.5, 0.9))
        self.optimizer_c = torch.optim.Adam(self.critic.parameters(), betas=(0.5, 0.9))
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.epoch = 0  # epochs done
        self.log = []  # a row for each of them
        self.history = []  # the options of the runs that --init began from
        self.contents = None  # the digest of a resumed run's photographs

    def autocast(self):
        """The context of --amp, in which convolutions compute with 16 bits."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.amp)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def options(self):
        """The options that the result depends on and --resume must repeat, as plain types."""
        options = json.loads(json.dumps(vars(self.args), default=str))
        for name in self.MAY_DIFFER:
            del options[name]
        return options

    def start_from(self, path):
        """Begin with the generator of another run's g.pt. Raises UsageError for another width."""
        generator, info = load_generator(path, self.device)
        width = info["history"][-1]["width"]
        if self.args.width != width:
            raise UsageError(f"--width {self.args.width}: --init {path} has {width}; take that")
        self.generator.load_state_dict(generator.state_dict())
        self.ema.load_state_dict(generator.state_dict())
        self.history = info["history"]
        self.history[-1]["test_means"] = info["test_means"]

    def check_finite(self, means, epoch):
        """Raise FloatingPointError for terms or weights that g.pt cannot hold."""
        finite = [math.isfinite(mean) for mean in means.values()]
        for network in (self.generator, self.critic, self.ema):
            weights = compact(network.state_dict())
            finite += [value.isfinite().all() for value in weights.values()]
        if not all(finite):
            raise FloatingPointError(f"epoch {epoch + 1} diverged ({means}); nothing of it was "
                                     "saved; try a lower --lr or --pretrain-lr")

    def save(self, photos):
        """Write last.pt, and then what follows from it: a kill in between loses nothing."""
        state = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        state["options"] = self.options() | {"epoch": self.epoch}
        state |= {"history": self.history, "log": self.log, "contents": photos.contents}
        with replacing(self.args.out / "last.pt") as part:
            torch.save(state, part)
        self.save_results(photos)

    def save_results(self, photos):
        """Write g.pt and log.csv; a log that cannot be written, since it is open, stops no run."""
        self.save_generator("g.pt", photos)
        columns = dict.fromkeys(name for row in self.log for name in row)
        try:
            with replacing(self.args.out / "log.csv") as part, open(part, "w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.log)
        except OSError as error:
            say(f"warning: {error}", sys.stderr)

    def save_generator(self, name, photos):
        """Write the moving average as it is now, for load_generator."""
        options = self.options() | {"epoch": self.epoch}
        checkpoint = {"history": [*self.history, options], "test_means": photos.test_means}
        checkpoint |= {"generator": compact(self.ema.state_dict()), "size": self.args.size}
        with replacing(self.args.out / name) as part:
            torch.save(checkpoint, part)

    def load(self, path):
        """Go on from last.pt. Raises UsageError where an option or a network is another."""
        with loading(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            saved = checkpoint["options"]
            self.epoch = saved["epoch"]
            self.log = checkpoint["log"]
            self.history = checkpoint["history"]
            self.contents = checkpoint["contents"]
            # Another option would not be the same run.
            for name, value in self.options().items():
                if saved.get(name, value) != value:
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise UsageError(f"{flag}: the run in {path.parent} has {saved[name]}; resume "
                                     "with that, or start another --out")
            for name in self.STATEFUL:
                getattr(self, name).load_state_dict(checkpoint[name])


def compact(state):
    """A state_dict on the CPU, its weights in float16; batch norm's statistics may be beyond it."""
    small = {}
    for name, value in state.items():
        if value.ndim > 1:
            value = value.half()
        small[name] = value.cpu()
    return small


# --- HOUSEKEEPING: processes and the command line ------------------------------------------------

def join_processes(device):
    """Join the processes of torchrun, if it started this one. Returns the rank and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    # None stands for the accelerator's backend, where there is one.
    backend = "gloo" if device == "cpu" else None
    # The others wait while the first decodes, which may take long.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size()


def resolve_amp(name, device):
    """What --amp auto stands for on this device; last.pt keeps it, and --resume insists on it."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "off"
    # A T4 (7, 5) only emulates bf16, slowly.
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser(__doc__)

    add = parser.add_argument_group("data").add_argument
    add(
        "--data", default=DEFAULT_DATA, metavar="DIR",
        help="folder of images; where the default does not exist, Flowers102 is downloaded into "
        "it; demo: crops of scikit-image's pictures")
    add(
        "--size", type=number(int, 32, 1024), default=128,
        help="side of the network's pictures in pixels, a multiple of 16")
    add(
        "--aged", type=number(float, 0, 1), default=0.5,
        help="share of the training images made grey as film, prints and scans do; half as many "
        "lie on paper")

    add = parser.add_argument_group("networks").add_argument
    add(
        "--width", type=number(int, 1, 512), default=64,
        help="channels of the first block of generator and critic")
    add(
        "--init", type=Path, metavar="CKPT",
        help="start from the generator of this g.pt: same --width, any --size")

    add = parser.add_argument_group("training").add_argument
    add(
        "--pretrain-epochs", type=number(int, 0), default=100,
        help="epochs of L1 alone")
    add(
        "--epochs", type=number(int, 0), default=110,
        help="epochs of WGAN-GP after that")
    add(
        "--batch-size", type=number(int, 1), default=32,
        help="images a step, over all processes")
    add(
        "--pretrain-lr", type=number(float, 0), default=1e-3,
        help="highest learning rate of L1: a warm-up leads to it, then a cosine to 0")
    add(
        "--lr", type=number(float, 0), default=1e-4,
        help="learning rate of WGAN-GP, constant")
    add(
        "--critic-steps", type=number(int, 1), default=1,
        help="critic steps on each batch (WGAN-GP: 5, on other batches)")
    add(
        "--generator-steps", type=number(int, 1), default=2,
        help="generator steps after those (WGAN-GP: 1)")
    add(
        "--lambda-l1", type=number(float, 0), default=1000.0,
        help="weight of L1 beside the critic's score, on ab / 110 (pix2pix: 100)")
    add(
        "--lambda-gp", type=number(float, 0), default=10.0,
        help="weight of the gradient penalty (WGAN-GP: 10)")
    add(
        "--ema", type=number(float, 0, 1), default=0.999,
        help="decay, a batch, of the moving average of the weights; 0: none")
    add(
        "--seed", type=number(int, 0, 2**32 - 1), default=0,
        help="seed of all that is random but the split, which is fixed")
    add(
        "--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="16-bit arithmetic; auto: what the CUDA device has, elsewhere off")
    add(
        "--device", default="auto",
        help="auto, cpu, mps, cuda or cuda:N")
    add(
        "--out", type=Path,
        help="folder for the results; if none is named, runs, for --eval none")
    add(
        "--resume", action="store_true",
        help="go on from OUT/last.pt where there is one")

    add = parser.add_argument_group("evaluation").add_argument
    add(
        "--sample-every", type=number(int, 1), default=5, metavar="EPOCHS",
        help="from one picture of validation images to the next")
    add(
        "--eval", type=Path, nargs="+", metavar="CKPT",
        help="train nothing: evaluate these on the test part of --data")

    # What no single option can tell is refused here, before anything is read.
    args = parser.parse_args(argv)
    if args.size % 16:
        parser.error(f"--size {args.size}: must be a multiple of 16")
    if args.pretrain_epochs + args.epochs == 0:
        parser.error("--epochs 0 and --pretrain-epochs 0: nothing to train")
    if not args.eval:
        args.out = args.out or Path("runs")
        # What is hidden does not count: a process that was killed may leave a .part file.
        taken = args.out.is_file() or any(args.out.glob("[!.]*"))
        if taken and not args.resume:
            parser.error(f"--out {args.out}: is there already; --resume goes on, or name another")
        if (args.out / "g.pt").exists() and not (args.out / "last.pt").exists():
            parser.error(f"--resume: {args.out} has a g.pt, but no last.pt to go on from; --init "
                         "that g.pt into another --out")
    if args.out and args.data != "demo":
        if args.out.resolve().is_relative_to(Path(args.data).resolve()):
            parser.error(f"--out {args.out}: lies in --data {args.data}, where its pictures would "
                         "be taken for photographs; name another")
    return args


def start(args):
    """Train by the options, and report on the result."""
    # Setup: what is found out here joins the options, for --resume to insist on.
    rank, args.nproc_per_node = join_processes(args.device)
    device = pick_device(args.device)
    args.amp = resolve_amp(args.amp, device)
    torch.backends.cudnn.benchmark = True

    # Networks: parse_args lets a last.pt through only with --resume.
    run = Run(args, device)
    last = args.out / "last.pt"
    if last.exists():
        run.load(last)
    elif args.init:
        run.start_from(args.init)

    # Data: the first process decodes it, and then the others find it in the cache.
    if rank > 0:
        dist.barrier()
    photos = Photos(args.data, args.size, device)
    if rank == 0 and args.nproc_per_node > 1:
        dist.barrier()
    if run.contents not in (None, photos.contents):
        raise UsageError(f"--data {args.data}: not the images that the run in {args.out} was "
                         "trained on")
    if args.batch_size % args.nproc_per_node or args.batch_size > len(photos.train):
        raise UsageError(f"--batch-size {args.batch_size}: must be at most {len(photos.train)} "
                         f"(training images) and a multiple of {args.nproc_per_node} (processes)")

    # Loop: the folder is made now, so as not to fail after an epoch.
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if last.exists():
            run.save_results(photos)
        say(", ".join(f"{name} {value}" for name, value in vars(args).items()))
        say(f"{len(photos.train)} training, {len(photos.val)} validation and {len(photos.test)} "
            f"test images, on {photos.device}; epochs done: {run.epoch}")

    train(run, photos, rank)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        paths = [args.out / name for name in ("pretrained.pt", "g.pt")]
        generators = {str(p): load_generator(p, device) for p in paths if p.exists()}
        report(generators, photos, args.out)


def evaluate(args):
    """Print the table of --eval's generators. Of several processes one is enough."""
    if os.environ.get("RANK", "0") != "0":
        return
    device = pick_device(args.device)
    # One table is of one set of test images, at one size.
    generators = {str(path): load_generator(path, device) for path in args.eval}
    sizes = sorted({info["size"] for _, info in generators.values()})
    if len(sizes) > 1:
        raise UsageError(f"--eval: generators of the sizes {sizes}; evaluate each by itself")
    report(generators, Photos(args.data, sizes[0], device), args.out)


def main(argv=None):
    """Run the command line. Returns the exit status."""
    args = parse_args(argv)
    if args.eval:
        return run_command(evaluate, args, "no table")
    return run_command(start, args, f"--resume goes on from {args.out}'s last save, if any")


if __name__ == "__main__":
    sys.exit(main())

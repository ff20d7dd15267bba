"""Train the colorizer: L1 pre-training, then WGAN-GP; or evaluate checkpoints.

    python train.py --epochs 110 --size 128
    torchrun --nproc-per-node 2 train.py --epochs 110 --size 128
    python train.py --eval g.pt

Isola et al. 2018, pix2pix (arXiv:1611.07004): the patch critic, and L1 beside it. Gulrajani et al.
2017, Improved Training of Wasserstein GANs (arXiv:1704.00028): the loss and its penalty.
"""
import copy
import csv
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
from torchvision.utils import save_image

from data import (
    DEFAULT_DATA, Parser, Photos, UsageError, denormalize, lab_to_rgb, live, number, replacing,
    rgb_to_lab, run_command, say)
from models import PatchCritic, UNet, fitting, load_generator, pick_device, to_device

SAVE_SECONDS = 30  # at least, between two saves: one writes 642 MB at width 64
MAY_DIFFER = {  # from the run that --resume goes on with
    "data", "device", "epochs", "eval", "init", "out", "resume", "sample_every"}


# --- METHOD: losses ------------------------------------------------------------------------------

def score(critic, L, ab):
    """One score an image, (N,): the mean of the critic's map.

    L: (N, 1, H, W), ab: (N, 2, H, W), both in [-1, 1]. The same definition in the losses and in
    the penalty, since the mean's gradient is smaller than the sum's by the size of the map.
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

    L: (N, 1, H, W); real_ab, fake_ab: (N, 2, H, W). One random mix an image; the L2 norm is over
    the image's whole gradient. L is the condition, the same in both, so the line between a real and
    a colorized picture varies in ab alone, and the gradient is taken there.
    Outside autocast: a second-order gradient loses too much in 16 bits. (Newer GPUs round what
    float32 convolutions read to TF32: float16's 10 bits, but float32's range.)
    """
    with torch.autocast(L.device.type, enabled=False):
        epsilon = torch.rand(len(L), 1, 1, 1, device=L.device)
        mixed = torch.lerp(fake_ab.float(), real_ab, epsilon).requires_grad_()
        # Images do not meet in the critic: the sum's gradient holds that of each one's own score.
        total = score(critic, L, mixed).sum()
        (gradient,) = torch.autograd.grad(total, mixed, create_graph=True)
        # vector_norm's gradient at 0 is 0, where that of sqrt(sum(g ** 2)) is NaN.
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return ((norm - 1) ** 2).mean()


# --- METHOD: one step ----------------------------------------------------------------------------

def pretrain_step(run, L, ab):
    """One L1 step of the generator. Returns its terms."""
    with run.autocast():
        l1 = F.l1_loss(run.generator(L), ab)
    step(run.generator, run.optimizer_g, l1, run.scaler)
    return {"l1": l1.detach()}


def adversarial_step(run, L, ab):
    """Critic steps, then generator steps, on one batch. Returns the terms of the last of each."""
    args = run.args
    with run.autocast():
        fake_ab = run.generator(L)
    for _ in range(args.critic_steps):
        with run.autocast():
            # Detached: the critic's step must not reach the generator.
            gap = critic_loss(score(run.critic, L, ab), score(run.critic, L, fake_ab.detach()))
        penalty = gradient_penalty(run.critic, L, ab, fake_ab.detach())
        # One backward for both: the penalty alone leaves the last bias without a gradient.
        step(run.critic, run.optimizer_c, gap + args.lambda_gp * penalty, run.scaler)

    run.critic.requires_grad_(False)  # spares gradients that nobody reads
    for i in range(args.generator_steps):
        with run.autocast():
            if i > 0:  # the first reuses that from above and its graph: generator unchanged
                fake_ab = run.generator(L)
            l1, fake_score = F.l1_loss(fake_ab, ab), score(run.critic, L, fake_ab)
            loss = generator_loss(l1, fake_score, args.lambda_l1)
        step(run.generator, run.optimizer_g, loss, run.scaler)
    run.critic.requires_grad_(True)
    terms = {"l1": l1, "adversarial": -fake_score.mean(), "wasserstein": -gap, "penalty": penalty}
    return {name: term.detach() for name, term in terms.items()}


def step(network, optimizer, loss, scaler):
    """Update one network by one loss. The scaler, enabled for float16 alone, skips overflows."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    average([p.grad for p in network.parameters()])
    scaler.step(optimizer)
    scaler.update()


def average(tensors):
    """Average a list of tensors, in place, over the processes of torchrun."""
    if dist.is_initialized():  # DistributedDataParallel does not support autograd.grad
        flat = torch.cat([tensor.flatten() for tensor in tensors])  # one call: in each, all wait
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor) / dist.get_world_size())


@torch.no_grad()
def update_ema(ema, generator, updates, decay):
    """Move ema, batch-norm statistics included, towards generator. updates: how many came before.

    The decay warms up in every run (TensorFlow's way): a short one must forget its first weights.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    for mean, value in zip(ema.state_dict().values(), generator.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)


def learning_rate(args, epoch):
    """Learning rate at a time counted in epochs, fractions included.

    Pre-training: a warm-up over its first tenth, then a half cosine to 0 (Loshchilov and Hutter
    2017). Adversarial phase: constant, so that a longer run is the same run, gone on.
    """
    if epoch >= args.pretrain_epochs:
        return args.lr
    done = epoch / args.pretrain_epochs
    return args.pretrain_lr * min(done / 0.1, 0.5 + 0.5 * math.cos(math.pi * (done - 0.1) / 0.9))


# --- METHOD: the loop ----------------------------------------------------------------------------

def train(run, photos, rank):
    """Train to the last epoch; the process of rank 0 evaluates, logs, draws and saves."""
    args, total = run.args, run.args.pretrain_epochs + run.args.epochs
    batch, steps = args.batch_size, len(photos.train) // args.batch_size
    for epoch in range(run.epoch, total):
        # All that is random follows from (seed, epoch): --resume needs no random state.
        rng = np.random.default_rng([args.seed, epoch])  # the same on all processes
        rows = photos.train[rng.permutation(len(photos.train))]
        torch.manual_seed(int(rng.integers(2**32)) + rank)  # crops, ageing, mixes: each its own
        terms, start = [], time.perf_counter()
        for i in range(steps):
            for optimizer in (run.optimizer_g, run.optimizer_c):
                optimizer.param_groups[0]["lr"] = learning_rate(args, epoch + (i + 0.5) / steps)
            chosen = rows[i * batch : (i + 1) * batch][rank :: args.processes]  # its share
            L, ab = photos.batch(chosen, crop=True, aged=args.aged)
            if epoch < args.pretrain_epochs:
                terms.append(pretrain_step(run, L, ab))  # left on the device: reading it would wait
            else:
                terms.append(adversarial_step(run, L, ab))
            update_ema(run.ema, run.generator, epoch * steps + i, args.ema)
            if rank == 0:
                rate = (i + 1) * batch / (time.perf_counter() - start)
                live(f"epoch {epoch + 1}: step {i + 1}/{steps}, {rate:.0f} images/s, "
                     f"{(steps - i - 1) * batch / rate:.0f} s left in it")

        means = {name: torch.stack([t[name] for t in terms]).mean() for name in terms[0]}
        average(list(means.values()))
        means = {name: mean.item() for name, mean in means.items()}  # waits for the device
        run.check_finite(means, epoch)
        run.epoch = epoch + 1
        if rank == 0:
            log_epoch(run, photos, means, steps * batch / (time.perf_counter() - start))
            if run.epoch % args.sample_every == 0 or run.epoch == total:
                path = args.out / f"epoch-{run.epoch:04}.png"
                save_picture([run.ema], photos, photos.val[:8], path)
            if run.epoch == total or time.monotonic() - run.saved >= SAVE_SECONDS:
                run.save(photos)


def log_epoch(run, photos, means, rate):
    """Evaluate the validation part, clean and aged; log and print it with the epoch's means."""
    predict = lambda L, ab: run.ema(L)
    figures = evaluate(predict, photos, photos.val)
    figures["aged_psnr"] = evaluate(predict, photos, photos.val, aged=1.0)["psnr"]
    val = {f"val_{name}": values.mean().item() for name, values in figures.items()}
    phase = "pretrain" if run.epoch <= run.args.pretrain_epochs else "wgan-gp"
    terms = dict.fromkeys(("l1", "adversarial", "wasserstein", "penalty")) | means
    run.log.append({"epoch": run.epoch, "phase": phase} | terms | val | {"images_per_s": rate})
    losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    say(f"epoch {run.epoch} {phase}  {losses}  val {val['val_psnr']:.2f} dB, aged "
        f"{val['val_aged_psnr']:.2f} dB, colourfulness {val['val_colourfulness']:.1f}  "
        f"{rate:.1f} images/s")


# --- HOUSEKEEPING: evaluation --------------------------------------------------------------------

def to_uint8(L, ab):
    """L and ab as networks see them, to RGB (N, 3, H, W) uint8, clipped as scikit-image does."""
    return (lab_to_rgb(denormalize(L, ab)) * 255).round().byte()


def colourfulness(images):
    """Colourfulness of pictures (N, 3, H, W) uint8: Hasler and Suesstrunk 2003, section 5.

    Returns (N,): 0 is grey, 109 extremely colourful.
    """
    r, g, b = images.float().flatten(2).unbind(1)
    rg, yb = r - g, (r + g) / 2 - b
    return torch.hypot(rg.std(1), yb.std(1)) + 0.3 * torch.hypot(rg.mean(1), yb.mean(1))


def ab_histogram(images):
    """Share of pixels in cells of 10 x 10 of a, b: (N, 3, H, W) uint8 to (N, 23 * 23), a first."""
    a, b = (rgb_to_lab(images / 255)[:, 1:] / 10 + 11).round().long().flatten(2).unbind(1)
    share = torch.full(a.shape, 1 / a.shape[1], device=images.device)
    return torch.zeros(len(a), 529, device=images.device).scatter_add(1, 23 * a + b, share)


def chunks(photos, rows):
    """Rows in pieces that take as much memory as 64 images of 128 x 128."""
    return rows.split(max(1, 64 * 128**2 // photos.size**2))


@torch.no_grad()
def evaluate(predict, photos, rows, full=False, aged=0.0):
    """Figures of every image: PSNR (dB, 8-bit RGB), colourfulness; full: SSIM and excess.

    predict: from L (N, 1, H, W) and the real ab (N, 2, H, W) to the ab that is judged. aged: the
    share of images that predict sees aged (on one kind of device always in the same way); its
    colours are joined with the photograph's own L. Returns a dict of tensors, a row an image: PSNR
    up to 100; excess: each cell's share of pixels (ab_histogram) minus the photograph's.
    """
    figures = []
    torch.manual_seed(0)  # of ageing; train seeds each epoch
    for chunk in chunks(photos, rows):
        L, ab = photos.batch(chunk)
        seen = photos.batch(chunk, aged=aged)[0] if aged else L
        fake, real = to_uint8(L, predict(seen, ab)), to_uint8(L, ab)
        error = (fake.float() - real.float()).square().mean((1, 2, 3))
        figures.append({"psnr": (10 * torch.log10(255**2 / error)).clamp_max(100),
                        "colourfulness": colourfulness(fake)})
        if full:
            figures[-1]["excess"] = ab_histogram(fake) - ab_histogram(real)
            pairs = zip(fake.cpu().numpy(), real.cpu().numpy())
            figures[-1]["ssim"] = torch.tensor(
                [structural_similarity(*pair, channel_axis=0) for pair in pairs])
    return {name: torch.cat([part[name] for part in figures]).cpu() for name in figures[0]}


@torch.no_grad()
def save_picture(generators, photos, rows, path):
    """Draw the images of these rows below each other: grey, colorized by each, and real."""
    L, ab = photos.batch(rows)
    colours = [torch.zeros_like(ab), *(generator(L) for generator in generators), ab]
    images = torch.cat([to_uint8(L, colour) for colour in colours]).cpu() / 255
    with replacing(path) as part:
        save_image(images, part, nrow=len(rows), format="png")


def report(paths, args, device, photos=None):
    """Print the table of generators on the test part; keep it, and eight pictures, in --out if any.

    paths: of g.pt files; photos: what they were trained on, if at hand; else --data is read.
    """
    loaded = [(str(path), *load_generator(path, device)) for path in paths]
    sizes = sorted({info["size"] for _, _, info in loaded})
    if len(sizes) > 1:
        raise UsageError(f"--eval: generators of the sizes {sizes}; evaluate each by itself")
    photos = photos or Photos(args.data, sizes[0], device)
    lines = [line for name, _, info in loaded for line in describe(name, info, photos)]

    means = [photos.batch(part)[1].mean((2, 3)) for part in chunks(photos, photos.train)]
    mean_ab = torch.cat(means).mean(0)[:, None, None]
    table = [("no colour", lambda L, ab: torch.zeros_like(ab), 0.0),
             ("mean colour of the training part", lambda L, ab: mean_ab.expand_as(ab), 0.0)]
    for name, generator, _ in loaded:
        predict = lambda L, ab, generator=generator: generator(L)
        table += [(name, predict, 0.0), (f"{name}, aged photographs", predict, 1.0)]
    table.append(("real", lambda L, ab: ab, 0.0))
    column = max(len(name) for name, _, _ in table) + 2
    title = f"{len(photos.test)} test images at {sizes[0]} x {sizes[0]}"
    lines.append(f"{title:{column}} PSNR dB   SSIM  colourfulness  mix error  worse than no colour")
    grey = evaluate(table[0][1], photos, photos.test)["psnr"]
    for name, predict, aged in table:
        live(f"evaluating: {name}")
        figures = evaluate(predict, photos, photos.test, full=True, aged=aged)
        psnr, ssim, colour = (figures[key].mean() for key in ("psnr", "ssim", "colourfulness"))
        worse = (figures["psnr"] < grey).float().mean()
        mix = figures["excess"].mean(0).clamp_min(0).sum()  # total variation distance
        lines.append(f"{name:{column}} {psnr:7.2f}  {ssim:.3f}  {colour:13.1f}  {mix:9.0%}  "
                     f"{worse:20.0%}")
    for line in lines:
        say(line)
    if args.out:
        with replacing(args.out / "test.txt") as part:
            part.write_text("\n".join(lines) + "\n", errors="backslashreplace")
        save_picture([generator for _, generator, _ in loaded], photos, photos.test[:8],
                     args.out / "test.png")


def describe(name, info, photos):
    """Lines on a generator: the options of each run that led to it; whether photos are its own."""
    for options in info["history"]:
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in options.items())
    ours, theirs = torch.tensor(photos.test_means), torch.tensor(info["test_means"])
    if ours.shape != theirs.shape or (ours - theirs).abs().mean() >= 2:  # of 255
        yield (f"warning: {name} was made with other images: those it was trained on may be among "
               "the ones tested here")


# --- HOUSEKEEPING: the state of a run, and its checkpoints ---------------------------------------

class Run:
    """All that training changes: networks, optimizers, moving average, scaler, epoch and log."""

    STATEFUL = ("generator", "critic", "ema", "optimizer_g", "optimizer_c", "scaler")

    def __init__(self, args, device):
        self.args, self.device = args, device
        torch.manual_seed(args.seed)
        self.generator = to_device(UNet(args.width), device)
        self.critic = to_device(PatchCritic(args.width), device)
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        # beta1 is pix2pix's, beta2 WGAN-GP's, whose beta1 is 0.
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), betas=(0.5, 0.9))
        self.optimizer_c = torch.optim.Adam(self.critic.parameters(), betas=(0.5, 0.9))
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch, self.log, self.history = 0, [], []  # history: of the runs it began from
        self.contents = None  # the digest of the photographs, of a resumed run
        self.saved, self.written = -math.inf, 0.0  # of the last save: our clock, last.pt's mtime

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def options(self):
        """The options that the result depends on and --resume must repeat, as plain types."""
        return {name: value for name, value in vars(self.args).items() if name not in MAY_DIFFER}

    def start_from(self, path):
        """Begin with the generator of another run's g.pt. Raises UsageError for another width."""
        generator, info = load_generator(path, self.device)
        width = info["history"][-1]["width"]
        if self.args.width != width:
            raise UsageError(f"--width {self.args.width}: --init {path} has {width}; take that")
        for network in (self.generator, self.ema):
            network.load_state_dict(generator.state_dict())
        self.history = info["history"]

    def check_finite(self, means, epoch):
        """Raise FloatingPointError for terms that are not finite, or weights beyond float16."""
        weights = [*self.generator.parameters(), *self.critic.parameters()]
        if not (all(map(math.isfinite, means.values()))
                and all(weight.half().isfinite().all() for weight in weights)):
            raise FloatingPointError(f"epoch {epoch + 1} diverged ({means}); nothing of it was "
                                     "saved; try a lower --lr or --pretrain-lr")

    def save(self, photos):
        """Write g.pt, log.csv and, last, last.pt: a kill in between repeats the epochs since."""
        out, last = self.args.out, self.args.out / "last.pt"
        if abs(self.written - (last.stat().st_mtime if last.exists() else 0)) > 2:  # FAT rounds it
            raise UsageError(f"--out {out}: another process trains there too; end one of them")
        weights = {name: value.half() if value.ndim > 1 else value  # statistics may pass 65504
                   for name, value in self.ema.state_dict().items()}
        own = self.options() | {"epoch": self.epoch}
        with replacing(out / "g.pt") as part:
            torch.save({"generator": weights, "size": self.args.size,
                        "history": [*self.history, own], "test_means": photos.test_means}, part)
        with replacing(out / "log.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self.log[-1])
            writer.writeheader()
            writer.writerows(self.log)
        state = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        with replacing(last) as part:
            torch.save(state | {"options": own, "history": self.history, "log": self.log,
                                "contents": photos.contents}, part)
        self.saved, self.written = time.monotonic(), last.stat().st_mtime

    def load(self, path):
        """Go on from last.pt. An option that the saved run did not have yet counts as its default.

        Raises UsageError where an option differs, or the networks of a changed models.py.
        """
        self.written = path.stat().st_mtime
        with fitting(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            saved = vars(parse_args(["--resume"])) | checkpoint["options"]  # it may lack some
            self.epoch, self.log = saved["epoch"], checkpoint["log"]
            self.history, self.contents = checkpoint["history"], checkpoint["contents"]
        for name, value in self.options().items():
            if saved[name] != value:
                flag = "torchrun --nproc-per-node" if name == "processes" else f"--{name}"
                raise UsageError(f"{flag.replace('_', '-')} {value}: the run in {path.parent} has "
                                 f"{saved[name]}; resume with that, or start another --out")
        with fitting(path):
            for name in self.STATEFUL:
                getattr(self, name).load_state_dict(checkpoint[name])


# --- HOUSEKEEPING: processes and the command line ------------------------------------------------

def join_processes(device):
    """Join the processes of torchrun, if it started this one. Returns the rank and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(pick_device(f"cuda:{os.environ['LOCAL_RANK']}"))
    backend = "gloo" if device == "cpu" else None  # None: the accelerator's, where there is one
    dist.init_process_group(backend, timeout=timedelta(hours=1))  # the others wait for the first
    return dist.get_rank(), dist.get_world_size()


def resolve_amp(name, device):
    """What --amp auto stands for on this device; last.pt keeps it, and --resume insists on it."""
    if name == "auto" and device.type == "cuda":  # a T4 (7, 5) emulates bf16, slowly
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "off" if name == "auto" else name


def parse_args(argv=None):
    """The options as a namespace; a wrong one ends the program with one line and status 2."""
    parser = Parser(__doc__)
    add, share, weight = parser.add_argument, number(float, 0, 1), number(float, 0)
    epochs, count = number(int, 0), number(int, 1)
    add("--data", default=DEFAULT_DATA, metavar="DIR", help="folder of images; where the default "
        "does not exist, Flowers102 is downloaded into it; demo: crops of scikit-image's pictures")
    add("--size", type=number(int, 32, 1024), default=128, help="side in pixels, a multiple of 16")
    add("--width", type=number(int, 1, 512), default=64, help="channels of each first block")
    add("--batch-size", type=count, default=32, help="images a step, over all processes")
    add("--pretrain-epochs", type=epochs, default=100, help="epochs of L1 alone")
    add("--epochs", type=epochs, default=110, help="epochs of WGAN-GP after that")
    add("--critic-steps", type=count, default=1, help="critic steps, all on one batch (WGAN-GP: 5)")
    add("--generator-steps", type=count, default=2, help="generator steps a batch (WGAN-GP: 1)")
    add("--lambda-l1", type=weight, default=1000.0, help="weight of L1, on ab / 110 (pix2pix: 100)")
    add("--lambda-gp", type=weight, default=10.0, help="weight of the penalty (WGAN-GP: 10)")
    add("--pretrain-lr", type=weight, default=1e-3, help="peak of L1's: warm-up, then cosine to 0")
    add("--lr", type=weight, default=1e-4, help="learning rate of WGAN-GP, constant")
    add("--aged", type=share, default=0.5, help="share of the training images made grey as film, "
        "prints and scans do; half as many lie on paper")
    add("--ema", type=share, default=0.999, help="decay, a batch, of the moving average; 0: none")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="16-bit arithmetic; auto: what the CUDA device has, elsewhere off")
    add("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of training; the split is fixed")
    add("--sample-every", type=count, default=5, metavar="EPOCHS", help="between two pictures")
    add("--out", type=Path, help="folder for the results; if none is named, runs, for --eval none")
    add("--init", type=Path, metavar="CKPT", help="start from this g.pt: same --width, any --size")
    add("--resume", action="store_true", help="go on from OUT/last.pt where there is one")
    add("--eval", type=Path, nargs="+", metavar="CKPT", help="evaluate these on --data's test part")
    args = parser.parse_args(argv)
    if args.size % 16:
        parser.error(f"--size {args.size}: must be a multiple of 16")
    if args.pretrain_epochs + args.epochs == 0:
        parser.error("--epochs 0 and --pretrain-epochs 0: nothing to train")
    if not args.eval:
        args.out = args.out or Path("runs")
        if (args.out.is_file() or any(args.out.glob("*"))) and not args.resume:
            parser.error(f"--out {args.out}: is there already; --resume goes on, or name another")
    if (args.out and args.data != "demo"
            and args.out.resolve().is_relative_to(Path(args.data).resolve())):
        parser.error(f"--out {args.out}: lies in --data {args.data}, where its pictures would be "
                     "taken for photographs; name another")
    return args


def start(args):
    """Train by the options, and report on the result."""
    # Setup
    rank, args.processes = join_processes(args.device)  # an option, too, for resume
    device = pick_device(args.device)
    args.amp = resolve_amp(args.amp, device)
    torch.backends.cudnn.benchmark = True

    # Networks
    run = Run(args, device)
    if (args.out / "last.pt").exists():  # so --resume: parse_args refuses it else
        run.load(args.out / "last.pt")
    elif args.init:
        run.start_from(args.init)

    # Data
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of a machine: it decodes, and the others,
    for my_turn in (first, not first):                # after it, find its cache
        if my_turn:
            photos = Photos(args.data, args.size, device)
        if dist.is_initialized():
            dist.barrier()
    if run.contents not in (None, photos.contents):
        raise UsageError(f"--data {args.data}: not the images that the run in {args.out} was "
                         "trained on")
    if args.batch_size % args.processes or args.batch_size > len(photos.train):
        raise UsageError(f"--batch-size {args.batch_size}: must be at most {len(photos.train)} "
                         f"(training images) and a multiple of {args.processes} (processes)")
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)  # to fail now, not after an epoch
        say(", ".join(f"{name} {value}" for name, value in vars(args).items()))
        say(f"{len(photos.train)} training, {len(photos.val)} validation and {len(photos.test)} "
            f"test images, on {photos.device}; from epoch {run.epoch + 1}")

    train(run, photos, rank)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        report([args.out / "g.pt"], args, device, photos)


def main(argv=None):
    """Run the command line. Returns the exit status."""
    args = parse_args(argv)
    if args.eval:
        return run_command(lambda: report(args.eval, args, pick_device(args.device)), "no table")
    return run_command(lambda: start(args), f"--resume goes on from {args.out}'s last save, if any")


if __name__ == "__main__":
    sys.exit(main())

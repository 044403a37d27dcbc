"""An autoencoder for MNIST in six linear layers, 784 → 144 → 288 → 20 → 288 → 288 → 784,
each used twice: see AutoEncoder.encode.

    python autoencoder.py           train it, save pictures, check it, print Success!
    python autoencoder.py search    choose its settings by how natural its digits are

The script does things: it trains, generates, judges and searches. test_autoencoder.py claims
things, and measures them. The task comes first, down to its test function. Then follow the
measures of generated digits, the search, and the command line.
"""

import argparse
import itertools
import math
import pickle
import random
import socket
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

# ---- The model and its objective ---------------------------------------------------------

LOSSES = {  # each is summed over the images of a batch; recon_x and x are (batch, inp_size)
    "euclidean": lambda recon_x, x: torch.linalg.vector_norm(recon_x - x, dim=1).sum(),
    "squared": lambda recon_x, x: (recon_x - x).square().sum(),
    "absolute": lambda recon_x, x: (recon_x - x).abs().sum(),
    "cross-entropy": lambda recon_x, x: -(  # 1e-7 keeps the logarithms finite
        x * (recon_x + 1e-7).log() + (1 - x) * (1 - recon_x + 1e-7).log()).sum(),
}


class AutoEncoder(nn.Module):
    """An encoder E and a decoder D: linear layers with SiLU between them.

    inp_size         numbers in an image
    hid_size         numbers in its code
    encoder_sizes    units of the encoder's hidden layers. The first reads all pixels, so
                     it is kept narrow: 288 units there gain 1 % and take 15 % longer
    decoder_sizes    units of the decoder's hidden layers
    loss             reconstruction loss, a name in LOSSES
    l1               weight of the L1 norm of all parameters in the loss of a batch. Off, for
                     speed: 0.001 gains 2 % and takes a tenth longer, and 0.01 loses 10 %
    dropout          probability of leaving out a hidden unit, in training
    refinements      how often `encode` corrects its code; 0 is the textbook's encoder
    """

    def __init__(self, inp_size: int, hid_size: int,
                 encoder_sizes=(144, 288), decoder_sizes=(288, 288),
                 loss="euclidean", l1=0.0, dropout=0.0, refinements=1):
        super().__init__()
        self.loss = loss
        self.l1 = l1
        self.dropout = dropout
        self.refinements = refinements
        self.encoder_names = self.add_layers("encoder", inp_size, *encoder_sizes, hid_size)
        self.decoder_names = self.add_layers("decoder", hid_size, *decoder_sizes, inp_size)

    def add_layers(self, side: str, *sizes: int) -> list[str]:
        """Add layers as direct children, which the task wants; return their names."""
        names = [f"{side}{number}" for number in range(1, len(sizes))]
        for name, size_in, size_out in zip(names, sizes, sizes[1:]):
            self.add_module(name, nn.Linear(size_in, size_out))
        return names

    def run_layers(self, names: list[str], x: Tensor) -> Tensor:
        *hidden, last = names
        for name in hidden:
            x = F.silu(getattr(self, name)(x))
            x = F.dropout(x, self.dropout, self.training)
        return getattr(self, last)(x)

    def encode(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → codes (batch, hid_size).

        The code that E finds in one pass falls short of the best one for its image, which
        is known as the amortisation gap. So the code is decoded, the outcome is encoded,
        and the code moves by the difference, as often as `refinements` says:

            h ← h + E(x) − E(D(h)),    starting at h = E(x).

        Gradients go through all of it. After Marino, Yue and Mandt 2018 (arXiv:1807.09356).
        """
        first = self.run_layers(self.encoder_names, x)  # (batch, hid_size)
        h = first
        for _ in range(self.refinements):
            h = h + first - self.run_layers(self.encoder_names, self.decode(h))
        return h

    def decode(self, h: Tensor) -> Tensor:
        """Codes (batch, hid_size) → images (batch, inp_size), each value in [0, 1]."""
        return torch.sigmoid(self.run_layers(self.decoder_names, h))

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, inp_size) → their reconstructions (batch, inp_size)."""
        return self.decode(self.encode(x))

    def loss_function(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """The objective on a batch, both (batch, inp_size) → a scalar to back-propagate.

        Over all images the task's objective is, with parameters φ of D and θ of E,

            L(X, φ, θ) = Σ_i ‖x_i − D(E(x_i))‖₂  +  λ (‖φ‖₁ + ‖θ‖₁).

        Each batch adds its images' part of the sum and the whole penalty. So in an epoch of
        S steps the penalty counts S times, and the objective's λ is l1 times S.
        """
        loss = LOSSES[self.loss](recon_x, x)
        if self.l1:
            loss = loss + self.l1 * sum(p.abs().sum() for p in self.parameters())
        return loss


# ---- Data --------------------------------------------------------------------------------

TIMEOUT = 30  # seconds that a server of MNIST may take to answer


class Data(NamedTuple):
    train_images: Tensor  # (n, 1, 28, 28) in [0, 1]
    train_labels: Tensor  # (n,) from 0 to 9
    test_images: Tensor
    test_labels: Tensor
    name: str


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits of a font, turned, slanted, stretched and moved at random: images (count, 1,
    28, 28) in [0, 1] and labels (count,)."""
    font = ImageFont.load_default(size=25)
    glyphs = torch.empty(10, 1, 28, 28)
    for digit in range(10):
        glyph = Image.new("L", (28, 28))
        ImageDraw.Draw(glyph).text((14, 14), str(digit), 255, font, anchor="mm")
        glyphs[digit] = to_tensor(glyph)

    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    upright = torch.tensor([[1.05, 0.0, 0.0], [0.0, 1.05, 0.0]])
    spread = torch.tensor([[0.2, 0.4, 0.1], [0.2, 0.2, 0.1]])
    uniform = 2 * torch.rand(count, 2, 3, generator=generator) - 1  # in [-1, 1]
    maps = upright + spread * uniform  # (count, 2, 3), affine
    grid = F.affine_grid(maps, [count, 1, 28, 28], align_corners=False)
    images = F.grid_sample(glyphs[labels], grid, align_corners=False)
    return images.clamp(0, 1), labels


def load_data(folder: str | Path = "data") -> Data:
    """MNIST from `folder`, downloaded if need be. Where it cannot be had, the reason is
    printed, and digits are drawn instead. Raises OSError if `folder` cannot be made."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    usual_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        train, test = (MNIST(folder, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"MNIST cannot be had: {error}\nDrawn digits take its place, so the figures "
              f"below are not MNIST's. To have it, delete {Path(folder) / 'MNIST'} if it is "
              "there, and run this with a network.")
        return Data(*draw_digits(60_000, seed=0), *draw_digits(10_000, seed=1), "drawn digits")
    finally:
        socket.setdefaulttimeout(usual_timeout)
    return Data(train.data.unsqueeze(1) / 255, train.targets,
                test.data.unsqueeze(1) / 255, test.targets, "MNIST")


def make_loader(images: Tensor, labels: Tensor, batch_size=50, seed=0) -> DataLoader:
    """Batches of (images, labels) in a new random order each epoch. Each is taken out of
    the tensors at once, not image by image, which is slow."""
    order = RandomSampler(images, generator=torch.Generator().manual_seed(seed))
    batches = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(TensorDataset(images, labels), sampler=batches, batch_size=None)


# ---- Training ----------------------------------------------------------------------------

# The fast recipe, chosen on training images that were held out.
MERGE = 4      # of the loader's batches make one step
PEAK = 12      # the learning rate rises to so many times the optimizer's, and falls to 0
WARM_UP = 0.3  # share of the steps in which it rises

# Adam in one pass over the parameters, also on a CPU. Torch compares versions, not texts.
FUSED = torch.__version__ >= "2.4"


def merged_batches(loader: DataLoader, merge: int):
    """The images of `loader` without their labels, `merge` of its batches joined to one."""
    batches = iter(loader)
    while group := list(itertools.islice(batches, merge)):
        yield torch.cat([images for images, _ in group])


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """The average loss per image, and the mean squared error per pixel."""
    device = next(model.parameters()).device
    model.eval()
    loss = error = count = 0
    for images, _ in loader:
        x = images.to(device).flatten(1)
        recon_x = model(x)
        loss += model.loss_function(recon_x, x).item()
        error += (recon_x - x).square().mean(dim=1).sum().item()
        count += len(x)
    return loss / count, error / count


def train(model: nn.Module, optimizer: torch.optim.Optimizer,
          train_loader: DataLoader, test_loader: DataLoader | None,
          epochs: int = 10, pics: str | Path = "pics", fast: bool = False) -> nn.Module:
    """Train `model` on its own loss_function(recon_x, x), on its own device; return it.

    The loaders give (images, labels), images of shape (batch, 1, height, width) in [0, 1].
    Each epoch prints the average loss per image, in training and on the test images, and
    saves `pics`/reconstruction_<epoch>.png: eight test images above their reconstructions.
    An L1 penalty counts once a batch, so where batches are joined it weighs less in training.
    If `test_loader` is None, nothing is printed or saved.

    Each batch makes a step at the optimizer's learning rate. If `fast`, batches are joined
    and the rate goes through one cycle, which leaves it near 0. Raises FloatingPointError
    if the loss of an epoch is not finite, and OSError if a picture cannot be written.
    """
    device = next(model.parameters()).device
    merge = MERGE if fast else 1
    if fast:
        peaks = [PEAK * group["lr"] for group in optimizer.param_groups]
        steps = epochs * math.ceil(len(train_loader) / MERGE)
        # One step more, since at its end the rate would fall below 0.
        schedule = OneCycleLR(optimizer, peaks, steps + 1, pct_start=WARM_UP,
                              anneal_strategy="linear", cycle_momentum=False)
    if test_loader is not None:
        print(f"fast recipe: {MERGE} batches make a step, and the learning rate rises to "
              f"{PEAK} times its value and falls to 0, for speed and a lower error" if fast
              else "plain recipe: each batch makes a step at the optimizer's learning rate")
        Path(pics).mkdir(parents=True, exist_ok=True)
        shown = next(merged_batches(test_loader, merge=8))  # eight, if a batch has only one
        shown = shown[:8].to(device)

    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        total = count = 0
        for images in merged_batches(train_loader, merge):
            x = images.to(device).flatten(1)  # (200, 1, 28, 28) → (200, 784)
            loss = model.loss_function(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if fast:
                schedule.step()
            total += loss.item()
            count += len(x)
        if not math.isfinite(total):
            raise FloatingPointError(f"the training loss is {total} in epoch {epoch}: are "
                                     "the images in [0, 1]? If so, lower the learning rate")

        if test_loader is not None:
            test_loss, _ = evaluate(model, test_loader)
            recon_x = model(shown.flatten(1)).detach().view_as(shown)
            path = Path(pics) / f"reconstruction_{epoch}.png"
            save_image(torch.cat([shown, recon_x]), path, nrow=len(shown), pad_value=0.5)
            seconds = time.perf_counter() - start
            print(f"epoch {epoch:2}/{epochs}  train loss {total / count:.4f}  "
                  f"test loss {test_loss:.4f}  {seconds:.1f} s")
    return model.eval()


# ---- Generation --------------------------------------------------------------------------

class Density(NamedTuple):
    """A mixture of k Gaussians over codes of h numbers, in double precision."""
    weights: Tensor  # (k,), with sum 1
    means: Tensor    # (k, h)
    factors: Tensor  # (k, h, h): a Gaussian's covariance is factor @ factor.T


@torch.no_grad()
def fit_density(model: AutoEncoder, images: Tensor, components=100) -> Density:
    """The density of the codes of images (n, inp_size), from which new codes can be drawn
    (Ghosh et al. 2020, arXiv:1903.12436): a Gaussian for each cluster of k-means."""
    model.eval()
    codes = model.encode(images.to(next(model.parameters()))).cpu().double()  # (n, h)
    n, h = codes.shape
    means = codes[:: max(1, n // components)][:components]  # (k, h), for a start
    for _ in range(20):
        cluster = torch.cdist(codes, means).argmin(dim=1)  # (n,)
        counts = cluster.bincount(minlength=len(means)).double()  # (k,)
        sums = torch.zeros_like(means).index_add(0, cluster, codes)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None], means)

    residual = codes - means[cluster]
    products = residual[:, :, None] * residual[:, None, :]  # (n, h, h)
    sums = torch.zeros(len(means), h, h, dtype=codes.dtype).index_add(0, cluster, products)
    covariances = sums / counts.clamp(min=1)[:, None, None]
    ridge = 1e-3 * codes.var(dim=0).mean() + 1e-9  # so that no Gaussian is flat
    factors = torch.linalg.cholesky(covariances + ridge * torch.eye(h))
    return Density(counts / n, means, factors)


@torch.no_grad()
def generate(model: AutoEncoder, density: Density, count: int, seed: int = 0) -> Tensor:
    """Decode `count` codes from `density`: images (count, inp_size), in random order.

    To leave little noise in measures of the images, each Gaussian gives its exact share
    of the codes, and normal vectors come in pairs z and −z.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    places = (torch.arange(count) + 0.5) / count  # evenly in [0, 1]
    component = torch.bucketize(places, density.weights.cumsum(dim=0))
    component = component.clamp(max=len(density.weights) - 1)  # the sum may be 0.9999999

    half = torch.randn((count + 1) // 2, density.means.shape[1], generator=generator)
    noise = torch.stack([half, -half], dim=1).flatten(0, 1)[:count]  # (count, h)
    offsets = torch.einsum("nij,nj->ni", density.factors[component], noise.double())
    codes = density.means[component] + offsets
    codes = codes[torch.randperm(count, generator=generator)]
    return model.decode(codes.to(next(model.parameters())))


# ---- The test function -------------------------------------------------------------------

def check(passed: bool, message: str) -> None:
    """An assertion that `python -O` does not leave out."""
    if not passed:
        raise AssertionError(message)


def check_limits(model: nn.Module) -> None:
    """Check what the task asks of a model with 784 inputs and a code of 20 numbers."""
    x = torch.randn(1, 784, device=next(model.parameters()).device)
    with torch.no_grad():
        h = model.encode(x)
        recon_x = model.decode(h)
    check(h.shape == (1, 20), f"the code has shape {tuple(h.shape)}, not (1, 20)")
    check(recon_x.shape == (1, 784), f"the image has shape {tuple(recon_x.shape)}, not (1, 784)")

    layers = set()
    children = dict(model.named_children())
    for name, p in model.named_parameters():
        check(max(p.shape, default=0) <= 800, f"{name} has a dimension above 800")
        if p.requires_grad:
            layer = name.rpartition(".")[0]  # encoder1.weight → encoder1
            layers.add(layer)
            linear = isinstance(children.get(layer), nn.Linear)
            check(linear, f"{name} does not belong to an nn.Linear child of the model")
    check(len(layers) <= 6, f"{len(layers)} layers are trainable, and at most 6 may be")


def pca_error(train_images: Tensor, test_images: Tensor, size: int) -> float:
    """Mean squared error per pixel of the best linear code of `size` numbers (PCA); both
    sets of images are (n, 784), and the first is fitted."""
    _, vectors = torch.linalg.eigh(torch.cov(train_images.T))
    directions = vectors[:, -size:]  # (784, size): the eigenvalues are ascending
    residual = test_images - train_images.mean(dim=0)
    residual = residual - residual @ directions @ directions.T
    return residual.square().mean().item()


def test_work(data="data", pics="pics", epochs=10, seed=0, lr=1e-3, device=None, **settings):
    """The task's test function: train an AutoEncoder of these `settings`, print Success!🎉.

    The model has to keep the task's limits, and to beat the best linear code of its size
    on the test images. If not, an AssertionError says what failed. `device` is a GPU, if
    there is one, unless it is given.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    digits = load_data(data)
    train_loader = make_loader(digits.train_images, digits.train_labels, 50, seed)
    test_loader = make_loader(digits.test_images, digits.test_labels, 50, seed)
    try:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoEncoder(inp_size=784, hid_size=20, **settings).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=FUSED)
        check_limits(model)
    except Exception:
        print("Error during model creation:")
        raise
    try:
        train(model, optimizer, train_loader, test_loader, epochs, pics, fast=True)
    except Exception:
        print("Error during training:")
        raise

    _, error = evaluate(model, test_loader)
    train_x, test_x = digits.train_images.flatten(1), digits.test_images.flatten(1)
    linear_error = pca_error(train_x, test_x, size=20)
    density = fit_density(model, train_x[:10_000])
    generated = generate(model, density, 100, seed).view(100, 1, 28, 28)
    save_image(generated, Path(pics) / "generated.png", nrow=10, pad_value=0.5)
    print(f"mean squared error per pixel on the test images ({digits.name}): {error:.5f}, "
          f"of the best linear code (PCA): {linear_error:.5f}\n"
          f"{time.perf_counter() - start:.0f} s in all; pictures in {pics}")
    check(error < linear_error, "the model does not beat the best linear code of its size")
    print("Success!🎉")
    return model


test_work.__test__ = False  # it is a command, which pytest should not collect


# ---- How natural generated digits are ----------------------------------------------------

def harden(images: Tensor) -> Tensor:
    """Ink or paper: a soft threshold at 0.6 of the brightness of each image (n, 784).

    What is left is the shape of the strokes. Otherwise a digit that is a little dimmer or
    softer than others counts as far worse than one that is no digit.
    """
    top = images.topk(10, dim=1).values.mean(dim=1, keepdim=True)  # of the ten brightest
    return torch.sigmoid(12 * (images / top.clamp(min=1e-3) - 0.6))


class Classifier(nn.Module):
    """A small classifier of digits, whose last hidden layer serves as features."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, kernel_size=5, stride=2), nn.ReLU(),   # (n, 16, 12, 12)
            nn.Conv2d(16, 32, kernel_size=3, stride=2), nn.ReLU(),  # (n, 32, 5, 5)
            nn.Flatten(),
            nn.Linear(800, 64), nn.ReLU(),
        )
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 784) → logits (n, 10)."""
        return self.out(self.hidden(x))


def train_classifier(images: Tensor, labels: Tensor, seed=0, epochs=6) -> Classifier:
    """Train a Classifier on images (n, 784) that no autoencoder to be judged has seen."""
    torch.manual_seed(seed)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=FUSED)
    steps = epochs * math.ceil(len(images) / 100)
    schedule = LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def describe(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 784) → features (n, 64), each of length 10, and likeliest classes (n,).
    `classifier` has learnt hardened digits."""
    hidden = classifier.hidden(harden(images))
    return 10 * F.normalize(hidden), classifier.out(hidden).argmax(dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of two sets of features, (n, d) and (m, d).

    It is that of Gaussians with the sets' means μ and covariances C,

        |μ_a − μ_b|² + tr(C_a + C_b − 2 (C_a C_b)^½)    (Dowson and Landau 1982).

    In features of the Inception network it is the FID (Heusel et al. 2017,
    arXiv:1706.08500). For small sets it is biased upwards.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^½

    # C_a C_b has the eigenvalues of the symmetric C_a^½ C_b C_a^½.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (shift + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def class_balance(classes: Tensor, real_classes: Tensor) -> float:
    """The smallest ratio of a class's share of generated to its share of real images, from
    their classes (n,): 1 if all shares agree, 0 if a class is missing."""
    shares = classes.bincount(minlength=10) / len(classes)
    real_shares = real_classes.bincount(minlength=10) / len(real_classes)
    ratios = shares / real_shares
    return ratios[real_shares > 0].min().item()


@torch.no_grad()
def copy_ratio(model, generated: Tensor, held_out: Tensor, seen: Tensor) -> float:
    """The median distance of generated digits to the nearest that the density has `seen`,
    divided by that of held-out digits: 1 for new ones, 0 for copies; all are (n, 784). A
    decoded copy is blurred, so all go through the model. After Meehan et al. 2020
    (arXiv:2004.05675)."""
    seen = model(seen)
    nearest = torch.cdist(model(generated[:500]), seen).amin(dim=1)
    usual = torch.cdist(model(held_out[:500]), seen).amin(dim=1)
    return (nearest.median() / usual.median()).item()


@torch.no_grad()
def judge(model, seen: Tensor, real: Tensor, classifier, seed=0) -> dict[str, float]:
    """Judge 20,000 digits that `model` generates, from a density of the codes of `seen`,
    beside held-out `real` ones, and its reconstructions of these. Both are (n, 784)."""
    generated = generate(model, fit_density(model, seen), 20_000, seed)
    features, classes = describe(classifier, generated)
    real_features, real_classes = describe(classifier, real)
    return {"distance": frechet_distance(features, real_features),
            "balance": class_balance(classes, real_classes),
            "novelty": copy_ratio(model, generated, real, seen),
            "error": (model(real) - real).square().mean().item()}


# ---- The search for settings -------------------------------------------------------------

# A setting is Adam's learning rate and arguments of AutoEncoder. A trial is a setting with a
# name, a seed, a number of epochs, and the part of the data that judges it.
BY_HAND = {
    "default": {"lr": 0.001},
    "784-400-20": {"lr": 0.001, "encoder_sizes": (400,), "decoder_sizes": (400,),
                   "refinements": 0},
}
MIN_BALANCE = 0.5   # below it a class is missing; good settings have 0.7 to 0.9
MIN_NOVELTY = 0.85  # below it digits are copies; good settings have 0.97 to 1.1
MARGIN = 0.15       # scores within this share of the best are as good

# The 97.5 % points of Student's t distribution with 1, 2, … degrees of freedom.
STUDENT_T = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


class Found(NamedTuple):
    """What a search returns. A training is the result of a trial, see `run_trial`."""
    draws: list[dict]                  # trainings of the random settings, best first
    candidates: dict[str, list[dict]]  # name → its trainings, one for each repetition
    verdicts: dict[str, str]           # name → best, equal, undecided, worse or refused
    winner: str
    classifier: Classifier
    seen: Tensor                       # images (n, 784) whose codes give the densities


def draw_settings(count: int, seed: int) -> list[dict]:
    """Random settings. Losses take turns. Every fifth setting has no hidden layers, the
    others have one or two on each side. Half have no penalty, half or more no dropout."""
    rng = random.Random(seed)
    losses = rng.sample(list(LOSSES), len(LOSSES))
    settings = []
    for number in range(count):
        layers = 0 if number % 5 == 4 else rng.choice([1, 2])
        highest = 0.3 if layers else 0.0  # without hidden layers there is nothing to drop
        settings.append({
            "loss": losses[number % len(losses)],
            "l1": rng.choice([0.0, float(f"{10 ** rng.uniform(-6, -2):.2g}")]),
            "dropout": rng.choice([0.0, round(rng.uniform(0, highest), 2)]),
            "lr": float(f"{10 ** rng.uniform(-3.5, -2.5):.3g}"),  # 0.0003 to 0.003
            "encoder_sizes": tuple(rng.randint(64, 400) for _ in range(layers)),
            "decoder_sizes": tuple(rng.randint(64, 400) for _ in range(layers)),
            "refinements": rng.choice([0, 1]),
        })
    return settings


def split_data(images: Tensor, labels: Tensor, seed: int) -> dict[str, tuple]:
    """Disjoint random parts of images (n, …): name → images (m, 784) and labels (m,).

    Two thirds train the autoencoders, a sixth trains the classifier, a twelfth serves to
    choose and a twelfth to confirm the choice.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    twelfth = len(images) // 12
    parts = order.split([len(images) - 4 * twelfth, 2 * twelfth, twelfth, twelfth])
    names = ["train", "classifier", "choose", "confirm"]
    images = images.flatten(1)
    return {name: (images[part], labels[part]) for name, part in zip(names, parts)}


def train_setting(setting: dict, images, labels, epochs, seed) -> AutoEncoder:
    """A model of this setting, trained on images (n, 784) as the test function trains it."""
    torch.manual_seed(seed)
    arguments = {name: value for name, value in setting.items() if name != "lr"}
    model = AutoEncoder(784, 20, **arguments)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting["lr"], fused=FUSED)
    loader = make_loader(images, labels, seed=seed)
    return train(model, optimizer, loader, None, epochs, fast=True)


def cost(model: AutoEncoder) -> int:
    """Parameters times passes, the work of a training step."""
    return sum(p.numel() for p in model.parameters()) * (1 + model.refinements)


def run_trial(trial: dict, parts: dict, classifier: Classifier, out: Path) -> dict:
    """The result of `trial`: it, with scores and a `model`. One in `out` is used again."""
    path = out / f"{trial['name']} seed {trial['seed']}.pt"
    try:
        result = torch.load(path, weights_only=False)
        if trial.items() <= result.items():  # it is of the same trial
            return result
    except (OSError, RuntimeError, EOFError, LookupError, AttributeError, pickle.PickleError):
        pass  # there is none that can be read

    start = time.perf_counter()
    images, labels = parts["train"]
    real, _ = parts[trial["judged by"]]
    seed = trial["seed"]
    model = train_setting(trial["setting"], images, labels, trial["epochs"], seed)
    scores = judge(model, images[:10_000], real, classifier, seed)
    result = trial | scores | {"model": model}
    unfinished = path.with_suffix(".unfinished")
    torch.save(result, unfinished)
    unfinished.replace(path)  # so that other processes find the whole of it
    seconds = time.perf_counter() - start
    print(f"{path.stem:24} {result['distance']:8.3f}  {seconds:5.1f} s")
    return result


def run_trials(trials: list[dict], parts: dict, classifier, out: Path) -> list[dict]:
    """The results of `trials`. The processes of a group share the work through the folder
    `out`: each runs its part, and then all load the results of all."""
    if dist.is_initialized():
        for trial in trials[dist.get_rank()::dist.get_world_size()]:
            run_trial(trial, parts, classifier, out)
        dist.barrier()
    return [run_trial(trial, parts, classifier, out) for trial in trials]


def passes(result: dict) -> bool:
    """Whether no class is missing and the digits are not copies."""
    return result["balance"] >= MIN_BALANCE and result["novelty"] >= MIN_NOVELTY


def interval(differences: Tensor) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of differences (n,), with n at least 2."""
    count = len(differences)
    t = STUDENT_T[min(count - 1, len(STUDENT_T)) - 1]
    half = t * differences.std() / count ** 0.5
    return (differences.mean() - half).item(), (differences.mean() + half).item()


def compare(scores: dict[str, Tensor]) -> dict[str, str]:
    """Compare settings with the best, which has the lowest mean score: name → verdict.

    All have a score for each of the same seeds. What decides is the 95 % interval of the
    mean of their paired differences to the best: a setting is "equal" if all of it lies
    within MARGIN of the best mean, else "worse" if it lies above 0, else "undecided".
    """
    best = min(scores, key=lambda name: scores[name].mean())
    near = MARGIN * scores[best].mean().item()
    verdicts = {}
    for name in scores:
        low, high = interval(scores[name] - scores[best])
        if high <= near:  # then -near <= low too, since the mean difference is not below 0
            verdicts[name] = "equal"
        else:
            verdicts[name] = "worse" if low > 0 else "undecided"
    return verdicts | {best: "best"}


def search(images: Tensor, labels: Tensor, draws: int = 20, epochs: int = 3,
           repetitions: int = 5, seed: int = 0, out: str | Path = "search") -> Found:
    """Choose a setting by how natural the digits are that it generates.

    1. Random settings are trained and judged by held-out digits. The best two, and those
       set by hand, are the candidates.
    2. All candidates are trained anew with the same fresh seeds, and judged by fresh
       digits. The cheapest of the best and its equals wins. A candidate that misses
       classes or copies is refused, unless all do.

    `images` (n, 1, 28, 28) and labels (n,) are training images, which `seed` splits.
    Started again, it goes on from the results in the folder `out`. Delete that after a
    change of this file.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    parts = split_data(images, labels, seed)
    fingerprint = [len(images), images.double().sum().item(), seed]  # of data and split
    shared = {"epochs": epochs, "data": fingerprint}
    with torch.random.fork_rng(devices=[]):  # trainings set the seed of the whole process
        digits, classes = parts["classifier"]
        classifier = train_classifier(harden(digits), classes, seed)
        drawn = enumerate(draw_settings(draws, seed), start=1)
        trials = [{"name": f"draw {number}", "setting": setting, "seed": seed,
                   "judged by": "choose"} | shared for number, setting in drawn]
        ranked = run_trials(trials, parts, classifier, out)
        ranked.sort(key=lambda draw: (not passes(draw), draw["distance"]))

        best, second = ranked[0]["setting"], ranked[1]["setting"]
        settings = {"best draw": best, "second draw": second} | BY_HAND
        fresh_seeds = [1000 * (seed + 1) + repetition for repetition in range(repetitions)]
        trials = [{"name": name, "setting": settings[name], "seed": fresh_seed,
                   "judged by": "confirm"} | shared
                  for name in settings for fresh_seed in fresh_seeds]
        results = run_trials(trials, parts, classifier, out)

    candidates = {name: [r for r in results if r["name"] == name] for name in settings}
    passing = [name for name in candidates if all(map(passes, candidates[name]))]
    if not passing:
        passing = list(candidates)
    scores = {name: torch.tensor([training["distance"] for training in candidates[name]])
              for name in passing}
    verdicts = {name: "refused" for name in candidates} | compare(scores)
    good = [name for name in candidates if verdicts[name] in ("best", "equal")]
    winner = min(good, key=lambda name: cost(candidates[name][0]["model"]))
    return Found(ranked, candidates, verdicts, winner, classifier, parts["train"][0][:10_000])


def as_options(setting: dict) -> str:
    """A setting as options of the command line."""
    words = []
    for name, value in setting.items():
        values = value if isinstance(value, tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def save_sheet(found: Found, path: Path) -> None:
    """A picture: score and setting of each draw beside twenty digits that it generates."""
    font = ImageFont.load_default(size=10)
    sheet = Image.new("L", (840, 34 * len(found.draws)))
    for place, draw in enumerate(found.draws):
        density = fit_density(draw["model"], found.seen)
        digits = generate(draw["model"], density, 20).view(20, 28, 28)
        row = (255 * torch.cat(list(digits), dim=1)).byte()  # (28, 560)
        sheet.paste(Image.fromarray(row.numpy()), (280, 34 * place + 3))
        text = textwrap.fill(f"{draw['distance']:.3f} {as_options(draw['setting'])}", width=52)
        ImageDraw.Draw(sheet).text((2, 34 * place), text, 255, font, spacing=0)
    sheet.save(path)


def mean_and_spread(trainings: list[dict]) -> str:
    """The distances of trainings, in short."""
    values = torch.tensor([training["distance"] for training in trainings])
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def report(found: Found, test_images: Tensor, out: Path) -> None:
    """Print what was found, save a sheet, and judge the winner, the settings set by hand and
    the middle draw by test images (n, 1, 28, 28)."""
    print("\ndistance  balance  novelty    error  draw")
    for draw in found.draws:
        print("{distance:8.3f} {balance:8.2f} {novelty:8.2f} {error:8.4f}  ".format(**draw)
              + as_options(draw["setting"]))
    scores = torch.tensor([(draw["distance"], draw["error"]) for draw in found.draws])
    ranks = scores.argsort(dim=0).argsort(dim=0).double()
    print(f"rank correlation of distance and error: {torch.corrcoef(ranks.T)[0, 1]:.2f}")

    print(f"\n{'distance':14}{'held-out images':>17}{'test images':>17}  verdict")
    test_x = test_images.flatten(1)
    middle = {"middle draw": [found.draws[len(found.draws) // 2]]}
    for name, trainings in (found.candidates | middle).items():
        tested = ""
        if name in {found.winner, *BY_HAND, *middle}:
            tested = mean_and_spread([
                judge(training["model"], found.seen, test_x, found.classifier, training["seed"])
                for training in trainings])
        verdict = found.verdicts.get(name, "not compared")
        print(f"{name:14}{mean_and_spread(trainings):>17}{tested:>17}  {verdict}")

    save_sheet(found, out / "sheet.png")
    winner = found.candidates[found.winner][0]
    print(f"\nThe winner is {found.winner}. To train it: python autoencoder.py "
          f"--epochs {winner['epochs']} {as_options(winner['setting'])}")


# ---- The command line --------------------------------------------------------------------

def search_command(data="data", out="search", draws=20, epochs=3, seed=0) -> None:
    """Search on the training images, alone or beside other processes under torchrun."""
    torch.set_num_threads(1)  # so that the winner is the same for any number of processes
    grouped = dist.is_torchelastic_launched()
    if grouped:
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            load_data(data)  # one process downloads, the others wait
        dist.barrier()
    digits = load_data(data)
    found = search(digits.train_images, digits.train_labels, draws, epochs, seed=seed, out=out)
    if not grouped or dist.get_rank() == 0:
        report(found, digits.test_images, Path(out))
    if grouped:
        dist.destroy_process_group()


def in_range(kind: type, low: float, high: float):
    """A type for argparse: an int or a float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def main(argv: list[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # some consoles lack 🎉, ±
    argv = sys.argv[1:] if argv is None else argv
    searching = argv[:1] == ["search"]
    # What is not given keeps the default of the function that it is passed to.
    parser = argparse.ArgumentParser(
        prog="autoencoder.py search" if searching else "autoencoder.py",
        argument_default=argparse.SUPPRESS,
        description="Choose settings by how natural the digits are that they generate."
        if searching else "Train an autoencoder on MNIST, check it and print Success!🎉 "
        "`autoencoder.py search --help` tells of the search for settings.")
    add = parser.add_argument
    add("--data", help="folder of MNIST, downloaded if it is not there (data)")
    add("--epochs", type=in_range(int, 1, 1000), help="passes over the images (10, search: 3)")
    add("--seed", type=int, help="random seed (0)")
    if searching:
        add("--out", help="folder for results, from which a search goes on (search)")
        add("--draws", type=in_range(int, 2, 1000), help="random settings to try (20)")
    else:
        size = in_range(int, 1, 800)
        add("--pics", help="folder for pictures (pics)")
        add("--device", choices=["cpu", "cuda", "mps"], help="cuda, if there is one, or cpu")
        add("--lr", type=in_range(float, 0, 1), help="learning rate of Adam (0.001)")
        add("--encoder-sizes", type=size, nargs="*", metavar="N", help="hidden units (144 288)")
        add("--decoder-sizes", type=size, nargs="*", metavar="N", help="hidden units (288 288)")
        add("--loss", choices=LOSSES, help="reconstruction loss (euclidean)")
        add("--l1", type=in_range(float, 0, 1e6), help="weight of the parameters' L1 norm (0)")
        add("--dropout", type=in_range(float, 0, 0.99), help="share of units left out (0)")
        add("--refinements", type=in_range(int, 0, 9), help="corrections of a code (1)")

    options = vars(parser.parse_args(argv[1:] if searching else argv))
    # More threads hardly help so small a network, and others may need the cores.
    torch.set_num_threads(min(4, max(1, torch.get_num_threads() // 2)))
    command = search_command if searching else test_work
    try:
        command(**options)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()

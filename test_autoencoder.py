"""Tests of autoencoder.py. They need no network; those that need MNIST are skipped if `data` lacks it.

    python -m pytest -k "not answer"     the quick part, a minute
"""

import atexit
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

import autoencoder as ae

torch.set_num_threads(1)  # threads of two busy processes spin for each other

HERE = Path(__file__).resolve().parent
MNIST_FOLDER = HERE / "data"
HAS_MNIST = all((MNIST_FOLDER / "MNIST" / "raw" / name).is_file() for name in ae.FILES)
NO_MNIST = "MNIST is not in the folder data: `python autoencoder.py` downloads it"
FONT_DIGITS = ae.Data(*ae.draw_digits(3000, 1), *ae.draw_digits(500, 2), "drawn digits, not MNIST")
IMAGES, INDEX = torch.rand(400, 1, 28, 28), torch.tensor([250])
STREAM = type("Stream", (DataLoader,), {"__len__": None})  # a loader that does not know its length
fail = Mock(side_effect=TypeError("no such layer"))


def small(**settings):
    torch.manual_seed(0)
    return ae.AutoEncoder(784, 20, **{"width": 32, "depth": 2} | settings)


def say(text, capfd):
    """Show on the terminal what is going on."""
    with capfd.disabled():
        print(f"\n  {text}", end="", flush=True)


def load(images, batch_size=5, kind=DataLoader, **options):
    return kind(TensorDataset(images, torch.zeros(len(images))), batch_size, **options)


# ---- The model, its objective, its training ------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"refinements": 0}, {"refinements": 2}, {"width": 1},
                                      {"depth": 1}, {"depth": 2, "width": 800}, {"dropout": 0.5}])
def test_model_keeps_the_limits_and_is_its_formula(settings):
    """Linear layers with SiLU between; a refinement moves the code by what comes back different."""
    def through(side, x):
        first, *others = (layer for name, layer in model.named_children() if name.startswith(side))
        return functools.reduce(lambda x, layer: layer(F.silu(x)), others, first(x))

    model, x = ae.AutoEncoder(784, 20, **settings), torch.rand(5, 784)
    ae.check_limits(model)
    assert torch.equal(model(x), model(x)) is ("dropout" not in settings)
    model.eval()
    h = through("encoder", x)
    for _ in range(settings.get("refinements", 1)):
        h = h + through("encoder", x) - through("encoder", through("decoder", h).sigmoid())
    assert_close([model.encode(x), model(x)], [h, through("decoder", h).sigmoid()])


@pytest.mark.parametrize("document", ["autoencoder.py", "README.md"])
def test_documents_state_the_architecture(document):
    """As 784-144-288-20-288-288-784, or with arrows and words between the numbers."""
    sizes = re.findall(r"out_features=(\d+)", str(ae.AutoEncoder(784, 20)))  # of encoder and decoder in turn
    text = re.sub(r"[^\d\n]+", "-", (HERE / document).read_text(encoding="utf-8"))
    assert "-".join(["784", *sizes[::2], *sizes[1::2]]) in text


@pytest.mark.parametrize("name, value, allowed", [
    ("loss", "mse", "euclidean, squared, absolute, cross-entropy"), ("regulariser", None, "l1, l2, code"),
    ("strength", math.nan, "number from 0"), ("depth", 2.0, "whole number"), ("width", 0, "from 1 to 800"),
    ("hid_size", 0, "from 1"), ("feedback", 1, "refinements"), ("lr", 1e-3, "only loss")])
def test_bad_settings_are_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name}.*{allowed}"):
        ae.AutoEncoder(**{"inp_size": 784, "hid_size": 20} | {name: value})


@pytest.mark.parametrize("name, part, cause", [
    ("encode", lambda x: x[:, :21], "representation has shape .1, 21"),
    ("decode", lambda h: torch.zeros(1, 1, 784), "reconstruction has shape .1, 1, 784"),
    ("more", nn.Linear(20, 801), "above 800"), ("more", nn.Sequential(nn.Linear(20, 20)), r"more\.0"),
    ("more", nn.Conv2d(1, 1, 3), "more"), ("more", nn.Parameter(torch.ones(())), "more is not of")])
def test_a_model_that_breaks_a_limit_is_refused(name, part, cause):
    model = small()
    model.encode, model.decode = lambda x: x[:, :20], lambda h: torch.zeros(1, 784)
    setattr(model, name, part)
    with pytest.raises(AssertionError, match=cause):
        ae.check_limits(model)


@pytest.mark.parametrize("settings", [{}, {"loss": "squared", "regulariser": "l2"}, {"loss": "cross-entropy"},
                                      {"loss": "absolute", "regulariser": "code"}])
def test_losses_penalties_and_gradients_are_their_formulas(settings):
    torch.manual_seed(0)
    model = ae.AutoEncoder(6, 2, width=4, dropout=0.5, strength=9.0, **settings).double()
    x = torch.rand(3, 6, dtype=torch.float64)
    theta, h = torch.cat([p.flatten() for p in model.parameters()]), model.encode(x)
    with patch.object(model, "encode", side_effect=[h]):  # codes of a second pass differ
        y = model(x)
        loss = model.loss_function(y, x)
    distances = {None: (x - y).norm(dim=1), "squared": (x - y).square(), "absolute": (x - y).abs(),
                 "cross-entropy": -(x * y.log() + (1 - x) * (1 - y).log())}  # None: the default
    penalties = {None: theta.abs(), "l2": theta.square(), "code": h.square() / 2}
    distance, penalty = distances[settings.get("loss")], penalties[settings.get("regulariser")]
    assert_close(loss, distance.sum() + 9 * penalty.sum())

    model.eval()
    assert torch.autograd.gradcheck(lambda *_: model.loss_function(model(x), x), tuple(model.parameters()))
    same = x.clone().requires_grad_()
    model.loss_function(same, x).backward()
    assert same.grad.isfinite().all()  # at a residual of zero


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 500}, {"kind": STREAM},
                                     {"batch_size": 37, "shuffle": True, "drop_last": True}])
def test_train_takes_any_loader_and_leaves_rates_and_threads(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(torch, "set_num_threads", fail)
    model, rates = small(), [0.001 * i for i in range(1, 9)]
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), rates)])
    loader = load(FONT_DIGITS.train_images[:101], **options)
    assert ae.train(model, optimizer, loader, load(FONT_DIGITS.test_images[:11]), 4, tmp_path) is model
    assert [group["lr"] for group in optimizer.param_groups] == rates
    first, *lines = capsys.readouterr().out.splitlines()
    assert "12 times 0.001" in first and "4 batches" in first  # what it does to rate and batches
    pattern = r"epoch  (\d)/4  train loss [\d.]+  test loss ([\d.]+)  [\d.]+ s"
    epochs, losses = zip(*(re.fullmatch(pattern, line).groups() for line in lines))
    assert epochs == ("1", "2", "3", "4") and float(losses[3]) < float(losses[0])


def test_ten_pictures_show_the_same_test_images_above_their_reconstructions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, x = small(), FONT_DIGITS.test_images[:20].flatten(1)
    ae.train(model, torch.optim.Adam(model.parameters()), load(FONT_DIGITS.train_images[:20]),
             load(FONT_DIGITS.test_images[:20], shuffle=True))
    pictures = [Image.open(f"pics/reconstruction_{epoch}.png").convert("L") for epoch in range(1, 11)]
    first, *_, last = (torch.tensor(np.array(picture)) / 255 for picture in pictures)
    assert first.shape == (2 * 30 + 2, 8 * 30 + 2) and torch.equal(first[:32], last[:32])
    shown, recon = last[2:, 2:].unfold(0, 28, 30).unfold(1, 28, 30).flatten(2)  # each (8, 784)
    which = torch.cdist(shown, x).argmin(1)
    assert_close(shown, x[which], rtol=0, atol=0.01)
    assert_close(recon, model(x[which]).detach(), rtol=0, atol=0.01)


def test_losses_are_averages_per_image_trained_in_training_mode():
    model, loader, x = small(), load(FONT_DIGITS.test_images[:31], 7), FONT_DIGITS.test_images[:31].flatten(1)
    loss, error = torch.linalg.vector_norm(model(x) - x, dim=1).mean().item(), F.mse_loss(model(x), x).item()
    unmoved = torch.optim.SGD(model.parameters(), lr=1e-12)
    for average in ae.fit(model, unmoved, loader, epochs=2):
        assert average == pytest.approx(loss, rel=1e-5) and model.training
        assert ae.evaluate(model, loader) == pytest.approx((loss, error), rel=1e-5) and not model.training


def test_the_rate_follows_one_cycle_over_steps_of_joined_batches():
    model, rates = small(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    list(ae.fit(model, optimizer, load(FONT_DIGITS.test_images[:185], 5), epochs=5))  # 37 batches: 10 steps
    assert rates == pytest.approx(np.interp((np.arange(50) + 0.5) / 50, [0, 0.2, 1], [0, 0.012, 0]))


@pytest.mark.parametrize("images, test_images, lr, message", [
    (IMAGES.index_fill(0, INDEX, math.nan), IMAGES, 1e-3, "training loss is .* epoch 1, step 2: .*images"),
    (IMAGES.index_fill(0, INDEX, 1e30), IMAGES, 1e-3, "training loss is .* epoch 1, step 2: .*images"),
    (IMAGES[:200], IMAGES, 4e37, "test loss is .* lower the learning"),  # parameters do
    (IMAGES, IMAGES * math.nan, 1e-3, "test loss is nan: check the images"),
    (IMAGES[:0], IMAGES, 1e-3, "training loader gives no"), (IMAGES, IMAGES[:0], 1e-3, "test loader g")])
def test_what_ends_training_is_named_and_harms_nothing(tmp_path, images, test_images, lr, message):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with pytest.raises((FloatingPointError, ValueError), match=message):
        ae.train(model, optimizer, load(images, 50), load(test_images, 50), 1, tmp_path)
    assert optimizer.param_groups[0]["lr"] == lr
    assert lr == 4e37 or all(p.isfinite().all() for p in model.parameters())


def test_pca_error_matches_a_singular_value_decomposition():
    train, test = (images.flatten(1) for images in (FONT_DIGITS.train_images[:1000], FONT_DIGITS.test_images))
    directions = torch.linalg.svd(train - train.mean(0), full_matrices=False).Vh[:20]
    residual = (test - train.mean(0)) - (test - train.mean(0)) @ directions.T @ directions
    assert ae.pca_error(train, test, 20) == pytest.approx(residual.square().mean().item(), rel=1e-4)


@pytest.mark.skipif(not HAS_MNIST, reason=NO_MNIST)
def test_answer_of_the_readme_on_mnist(tmp_path, monkeypatch, capfd):
    """A whole training: the name keeps it out of the quick part, `-k "not answer"`."""
    def show(line, **_):
        lines.append(line)
        if line.startswith("epoch"):
            say(line, capfd)

    lines = []
    monkeypatch.setattr(ae, "print", show, raising=False)
    ae.test_work(data=MNIST_FOLDER, pics=tmp_path)
    error, linear = map(float, re.search(r"test images: ([\d.]+), .*: ([\d.]+)", lines[-2]).groups())
    assert error <= 0.0050 and linear == pytest.approx(0.0236, abs=0.0002)
    assert lines[-1] == "Success!🎉 (MNIST)"


# ---- Data ----------------------------------------------------------------------------------------

def pack(values):
    """The bytes of an MNIST file."""
    return np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes() + values.byte().numpy().tobytes()


def write_mnist(folder, data, count):
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, part in zip(sorted(ae.FILES), [*data[2:4], *data[:2]]):  # t10k is before train
        (raw / name).write_bytes(pack(part[:count] if part.ndim == 1 else part[:count, 0].mul(255).round()))
    return raw


@pytest.mark.parametrize("damage", [
    lambda old: old[:-1], lambda old: b"", lambda old: old + b"\0", lambda old: old[8:],
    lambda old: pack(torch.zeros(11, 28, 27) if old[3] == 3 else torch.zeros(11)),
    lambda old: pack(torch.zeros(12, 27, 28) if old[3] == 3 else torch.full([12], 10))])
@pytest.mark.parametrize("name", ae.FILES)
def test_a_damaged_file_is_named_and_never_used(tmp_path, name, damage):
    """Cut, empty, too long, without its header, or not fitting the others."""
    path = write_mnist(tmp_path, FONT_DIGITS, 12) / name
    changed = damage(path.read_bytes())
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"{name} is damaged.*Delete"):
        ae.load_data(tmp_path)
    assert path.read_bytes() == changed


def test_absent_files_are_downloaded_and_present_ones_taken(tmp_path, monkeypatch):
    download = Mock(side_effect=lambda folder, download: write_mnist(folder, FONT_DIGITS, 60))
    monkeypatch.setattr(ae.mnist, "MNIST", download)
    for downloads, absent in ((1, ae.FILES), (1, []), (2, ae.FILES[3:])):
        for name in absent:
            (tmp_path / "MNIST" / "raw" / name).unlink(missing_ok=True)
        data = ae.load_data(tmp_path)
        assert data.name == "MNIST" and download.call_count == downloads
        assert_close(list(data[:4]), [part[:60] for part in FONT_DIGITS[:4]], rtol=0, atol=0.51 / 255)


def test_digits_are_drawn_without_a_download_unless_the_disk_is_full(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae, "draw_digits", lambda *_: FONT_DIGITS[:2])
    monkeypatch.setattr(ae, "SILENCE", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        threading.Timer(5, silent.close).start()  # ends the wait of whoever has no limit
        monkeypatch.setattr(ae.mnist.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        assert ae.load_data(tmp_path).name == "drawn digits, not MNIST"
    line, = capsys.readouterr().out.splitlines()
    assert "timed out" in line and "not MNIST. To get it" in line and socket.getdefaulttimeout() is None
    problems = [RuntimeError("File corrupted."), OSError(28, "No space left on device")]
    monkeypatch.setattr(ae.mnist, "MNIST", Mock(side_effect=problems))
    assert ae.load_data(tmp_path).name == "drawn digits, not MNIST"
    with pytest.raises(OSError, match="no room for MNIST.*--data"):
        ae.load_data(tmp_path)


def test_a_loader_gives_each_image_once_with_its_label_in_a_new_order():
    marked = torch.arange(101.0)
    loader, again = (ae.make_loader(marked, 2 * marked, batch_size=30, seed=3) for _ in range(2))
    first, second, same = ([*map(torch.cat, zip(*batches))] for batches in (loader, loader, again))
    assert len(loader) == 4 and torch.equal(first[1], 2 * first[0])
    assert torch.equal(first[0].sort().values, marked)
    assert torch.equal(first[0], same[0]) and not torch.equal(first[0], second[0])


def test_drawn_digits_are_bright_on_dark_and_repeatable():
    images, labels = ae.draw_digits(7000, 5)
    assert images.shape == (7000, 1, 28, 28) and images.min() == 0 and 0.9 < images.max() <= 1
    assert 0.05 < images.mean() < 0.25 and images[:, :, 0].mean() < 0.02
    assert (labels.bincount(minlength=10) > 600).all() and len(images.flatten(1).unique(dim=0)) == 7000
    assert torch.equal(images, ae.draw_digits(7000, 5)[0])
    assert not torch.equal(images, ae.draw_digits(7000, 6)[0])


# ---- Generating and measuring digits -------------------------------------------------------------

def test_a_density_becomes_more_likely_with_every_step():
    torch.manual_seed(0)
    codes, groups = torch.randn(300, 3) ** 3 + 1, torch.randint(4, (300,))
    values = []
    for steps in (0, 1, 2, 5, 20):
        weights, means, factors = ae.fit_density(codes, F.one_hot(groups), steps)
        parts = torch.distributions.MultivariateNormal(means, scale_tril=factors).log_prob(codes[:, None])
        values.append((parts + weights.log()).logsumexp(1).mean().item())
    assert values == sorted(values) and values[-1] > values[0] + 0.1


def test_a_generator_fitted_to_its_own_draws_is_the_same_whatever_the_mode():
    model = nn.Linear(1, 1)
    model.encode = model.decode = lambda x: F.dropout(x, 0.5, model.training)
    factors = torch.tensor([[[2.0, 0.0], [1.0, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])
    density = ae.Density(torch.tensor([0.25, 0.75]), torch.tensor([[-9.0, 0.0], [9.0, 1.0]]), factors)
    codes, same, other = (ae.generate(model.train(), density, 40_000, seed) for seed in (1, 1, 2))
    assert torch.equal(codes, same) and not torch.equal(codes, other)
    fitted = ae.fit_generator(model.train(), codes[codes[:, 0].argsort()], 2, 40_000)  # a centre in each
    assert_close(fitted, density, rtol=0, atol=0.06)


def test_frechet_distance_matches_another_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 5)), rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
    assert ae.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


@pytest.fixture(scope="session")
def judged():
    """A reference of 1,000 digits, its feature network trained on others; and more digits with labels."""
    images, labels = ae.draw_digits(5000, 3)
    x = images.flatten(1)
    features = ae.train_features(x[:2000], labels[:2000], epochs=8)
    return ae.Reference(features, x[2000:3000], x[3000:4000]), x[4000:], labels[4000:]


def test_features_tell_digits_apart_and_measures_real_images_from_copies(judged):
    reference, images, labels = judged
    assert F.cross_entropy(reference.features(images), labels) < 0.15
    real, copies, some = map(reference.measure, (images, reference.train_images, images[labels > 1]))
    assert real["overlap"] > 0.85 and some["overlap"] == pytest.approx(0.8, abs=0.05)
    assert 0.8 < real["ratio"] < 1.2 and copies["ratio"] < 0.01
    hidden, other = map(reference.features.hidden, (images, reference.images))
    assert hidden.square().mean().item() == pytest.approx(1, abs=0.1)
    assert real["frechet"] == pytest.approx(ae.frechet_distance(hidden, other))
    assert 3 * real["frechet"] < min(some["frechet"], reference.baseline()["frechet"])


def test_a_reference_takes_distances_of_250_images_or_of_what_it_has(judged, monkeypatch):
    nearest = Mock(side_effect=ae.nearest_distance)
    monkeypatch.setattr(ae, "nearest_distance", nearest)
    for images in (judged[1][:100], judged[1][:500]):
        same = ae.Reference(judged[0].features, images, judged[0].train_images).measure(images)
        assert same == pytest.approx({"frechet": 0, "overlap": 1, "ratio": 1}, abs=1e-5)
    assert [len(call.args[0]) for call in nearest.call_args_list] == [100, 100, 250, 250]


# ---- The search ----------------------------------------------------------------------------------

@pytest.fixture
def run_search(judged, tmp_path):
    """A search whose trials are pretended: only the bookkeeping is under test."""
    def run_search(change=lambda settings, seed: {}, name="drawn", **options):
        run_trial = lambda settings, seed, epochs, *_: {
            "frechet": settings["width"] / epochs + seed % 7, "overlap": 1.0, "ratio": 1.0, "mse": 0.0,
            "seconds": 0.0} | change(settings, seed)
        load_data = lambda *_: FONT_DIGITS._replace(name=name)
        with patch.multiple(ae, run_trial=run_trial, load_data=load_data, contact_sheet=Mock(),
                            train_features=lambda *_: judged[0].features):
            return ae.search(out=tmp_path, device="cpu", **options)
    return run_search


def read_trials(folder):
    """The finished trials by name; a line that is cut off, or being written, is none."""
    records = [json.loads(line) | {"seconds": 0} for path in folder.glob("trials-*.jsonl")
               for line in path.read_text().splitlines() if line.endswith("}")]
    return sorted(records, key=lambda record: record["job"])


def test_splits_are_disjoint_and_drawn():
    splits = ae.Splits(FONT_DIGITS._replace(train_images=torch.arange(3000.0).view(3000, 1, 1, 1)))
    parts = [splits.train, splits.features, splits.choice, splits.confirmation]
    assert [len(images) for images, _ in parts] == [2000, 500, 250, 250]
    images, labels = (torch.cat(part).flatten().long() for part in zip(*parts))
    assert images.tolist() != sorted(images.tolist()) == list(range(3000))
    assert torch.equal(labels, FONT_DIGITS.train_labels[images])


def test_drawn_settings_are_valid_varied_and_repeatable_at_their_cost():
    drawn, again = ([ae.draw_settings(trial, 3) for trial in range(60)] for _ in range(2))
    assert drawn == again and drawn[0] == ae.DEFAULT and drawn[1] != ae.draw_settings(1, seed=4)
    for settings in drawn:
        ae.check_limits(ae.make_model(settings))
    plain = ae.DEFAULT | {"depth": 1, "refinements": 0}
    assert ae.cost(plain | {"refinements": 2}) == 3 * ae.cost(plain) == 3 * (2 * 784 * 20 + 784 + 20)
    counts = {name: len({settings[name] for settings in drawn}) for name in ae.DEFAULT}
    assert [counts[name] for name in ("loss", "regulariser", "depth", "refinements")] == [4, 3, 3, 2]
    assert all(counts[name] > 20 for name in ("strength", "width", "dropout", "lr"))


@pytest.mark.parametrize("near, cost, chosen", [(1.15, 2, "near"), (1.15, 4, "best"), (1.18, 2, "best")])
def test_the_simplest_within_one_standard_error_is_chosen(near, cost, chosen):
    """1.0, 1.1, 1.2 have a mean of 1.1, a standard deviation of 0.1, and a standard error of 0.058."""
    scores = {"best": [1.0, 1.2, 1.1], "near": [near, near, near], "far": [2.0, 2.1, 2.2]}
    assert ae.choose_simplest(scores, {"best": 3, "near": cost, "far": 1}) == chosen


def test_missing_classes_copies_and_divergence_rank_last(judged):
    good, copies, missing = ({"frechet": frechet, "ratio": ratio, "overlap": overlap}
                             for frechet, ratio, overlap in ((9, 1.0, 0.95), (0, 0.0, 0.95), (1, 1.0, 0.5)))
    diverging = ae.DEFAULT | {"lr": 1e30, "loss": "cross-entropy"}
    diverged = ae.run_trial(diverging, 0, 0.2, ae.Splits(FONT_DIGITS), judged[0])
    assert sorted([diverged, missing, good, copies], key=ae.rank_key) == [good, copies, missing, diverged]


def test_search_halves_then_confirms_then_tests_with_fresh_seeds(run_search, tmp_path):
    winner, widths = run_search(), []  # by its pretended score, the smaller width is the better
    for stage, split, seeds, epochs, count in (
            ("round 1", "choice", {0}, 1 / 3, 27), ("round 2", "choice", {0}, 1, 9),
            ("confirm", "confirmation", {1000, 1001, 1002}, 3, 12),
            ("test", "test", {2000, 2001, 2002}, 3, 9)):
        part = [record for record in read_trials(tmp_path) if record["job"].startswith(stage)]
        assert [len(part), part[0]["epochs"]] == pytest.approx([count, epochs])
        assert {record["split"] for record in part} == {split}
        assert {record["seed"] for record in part} == seeds
        widths.append(sorted({record["settings"]["width"] for record in part}))
    assert widths[1] == widths[0][:len(widths[1])] and widths[2] == [*widths[0][:3], 288]  # and the default
    assert winner["width"] in widths[0][:3]


def test_a_default_that_wins_is_tested_once(run_search, tmp_path):
    assert run_search(lambda settings, _: {"frechet": float(settings != ae.DEFAULT)}, trials=3) == ae.DEFAULT
    assert sum(record["settings"] == ae.DEFAULT for record in read_trials(tmp_path)) == 1 + 3 + 3


def test_a_search_in_which_every_finalist_diverges_with_one_seed_says_so(run_search):
    with pytest.raises(FloatingPointError, match="no finalist could be trained"):
        run_search(lambda _, seed: {"frechet": math.inf} if seed == 1001 else {}, trials=3)


def test_trials_of_another_search_are_not_mixed_in(run_search, tmp_path, monkeypatch):
    for options in ({}, {"epochs": 2}, {"seed": 7}, {"trials": 4}, {"name": "MNIST"}):
        run_search(**{"trials": 3} | options)
    monkeypatch.setattr(torch, "__version__", "another")
    run_search(trials=3)
    assert len([*tmp_path.glob("trials-*.jsonl")]) == 6


def test_machines_with_other_data_or_another_script_are_not_mixed(run_search, monkeypatch):
    def gather(found, mine):
        found[:] = mine, ("trials-of-another.jsonl", {})

    monkeypatch.setattr(ae, "dist", Mock(
        is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2, all_gather_object=gather))
    with pytest.raises(RuntimeError, match="differ in data, script or PyTorch"):
        run_search()


# ---- The command line ----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """A command for a small search, and what one process finds with it: the winner and the trials."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    write_mnist(data, FONT_DIGITS, 1200)
    winner = ae.search(data, out, trials=3, epochs=1, device="cpu")
    return f"search --data {data} --trials 3 --epochs 1 --device cpu --out ", winner, read_trials(out)


def call(command, capfd):
    """The exit status of a command, and the lines that it writes to standard output and standard error."""
    status = 0
    try:
        ae.main(command.split())
    except SystemExit as error:
        status = error.code
    return status, *(text.strip().splitlines() for text in capfd.readouterr())


@pytest.mark.parametrize("act, status, message", [
    (lambda: multiprocessing.active_children()[0].kill(), 2, "No finished trial is lost: the same command"),
    (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "stopped")])
def test_a_search_that_is_broken_off_goes_on(one_process, tmp_path, capfd, act, status, message):
    """A worker is killed, or Ctrl-C pressed, after the first trial; a line is cut off."""
    def wait_and_act():
        while not read_trials(tmp_path):
            time.sleep(0.02)
        act()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background process lacks
    threading.Thread(target=wait_and_act, daemon=True).start()
    command, _, trials = one_process
    ended, _, err = call(f"{command} {tmp_path} --workers 2", capfd)
    assert ended == status and message in err[0] and len(err) == 1
    assert not multiprocessing.active_children()

    path, = tmp_path.glob("trials-*.jsonl")
    before = path.read_text() + '\n{"job": "round 1 tri'
    path.write_text(before)
    ae.main(f"{command} {tmp_path} --workers 2".split())
    assert path.read_text().startswith(before) and read_trials(tmp_path) == trials


def run(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=True,
                          encoding="utf-8", errors="replace", timeout=200)


def test_processes_under_torchrun_choose_and_report_what_one_chooses(one_process, tmp_path):
    command, winner, trials = one_process
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    done = run(*f"{torchrun} {HERE / 'autoencoder.py'} {command} {tmp_path}".split())
    assert done.returncode == 0, done.stderr
    assert read_trials(tmp_path) == trials
    assert Image.open(tmp_path / "contact_sheet.png").size == (64 + 20 * 28, 3 * 30)
    for label in ("other real images", "winner", "784-400-20", "PCA baseline"):
        assert len(re.findall(rf"^{label}.* [\d.]+", done.stdout, re.MULTILINE)) == 1
    options = done.stdout.splitlines()[-1].partition("python autoencoder.py ")[2].split()
    options = vars(ae.make_parser("train").parse_args(options))
    assert winner == {name: options[name] for name in winner}


@pytest.mark.parametrize("cores, limit, workers", [
    (64, ["max 100000"], 27), (4, OSError, 4), (64, ["800000 100000"], 8), (4, ["50000 100000"], 1)])
def test_workers_are_what_the_process_may_use_and_27_trials_fill(monkeypatch, cores, limit, workers):
    called = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(ae.Path, "read_text", Mock(side_effect=limit))
    monkeypatch.setattr(ae, "search_in_parallel", lambda workers, options: called.append(workers))
    monkeypatch.setattr(ae, "search", lambda **options: called.append(1))
    ae.main(["search"])
    assert called == [workers]


@pytest.mark.parametrize("name, place, picked", [
    ("cuda:1", 0, "cuda:1"), ("cuda", 3, "cuda:1"), ("auto", 2, "cuda:0"), ("cpu", 3, "cpu")])
def test_a_named_device_is_used_and_several_are_shared_out(monkeypatch, name, place, picked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda size, device: Mock(device=torch.device(device)))
    assert str(ae.pick_device(name, place)) == picked


def test_command_runs_without_data_or_network_on_any_console(tmp_path):
    options = f"--epochs 1 --width 32 --depth 2 --device cpu --data {tmp_path}/data --pics {tmp_path}/pics"
    done = run(HERE / "autoencoder.py", *options.split(), PYTHONUTF8="0", PYTHONIOENCODING="ascii",
               https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "not MNIST" in first and last == "Success! (drawn digits, not MNIST)"
    assert Image.open(tmp_path / "pics/generated.png").size == (10 * 30 + 2, 10 * 30 + 2)


@pytest.mark.parametrize("command", ["train", "search"])
def test_help_explains_every_option(command):
    parser = ae.make_parser(command)
    out, options = " ".join(parser.format_help().split()), vars(parser.parse_args([]))
    assert all(re.search(rf"--{option} [A-Z{{][^-]*[a-z]{{3}}[^-]*", out) for option in options)


def test_every_option_is_passed_on(monkeypatch):
    options = {"data": "d", "seed": 3, "device": "cpu", "epochs": 2, "pics": "p", "width": 40, "lr": 0.01}
    monkeypatch.setattr(ae, "test_work", Mock())
    ae.main([f"--{name}={value}" for name, value in options.items()])
    ae.test_work.assert_called_once_with(**ae.DEFAULT | options)


@pytest.mark.parametrize("arguments, message", [
    ("--epochs 0", "1 or more"), ("--width 900", "from 1 to 800"), ("--loss mse", "euclidean"),
    ("--device abacus", "abacus"), ("--lr -1", "lr must be"), ("--pics file", "--pics"),
    ("--data file", "--data"), ("search --out file", "--out"), ("search --lr 0.001", "--lr"),
    ("--trials 27", "--trials"), ("search --workers 0", "1 or more"), ("search --device abacus", "abacus")])
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    status, _, err = call(arguments, capfd)
    assert status == 2 and message in err[-1]


@pytest.mark.parametrize("changes, status, outcome", [
    ({"evaluate": lambda *_: (0.0, 0.0199)}, 0, "Success!🎉 (drawn digits, not MNIST)"),
    ({"evaluate": lambda *_: (0.0, 0.02)}, 1, "the model does not beat a linear code"),
    ({"AutoEncoder": fail}, 1, "error during model creation: no such layer"),
    ({"train": fail}, 1, "error during training: no such layer"),
    ({"train": lambda model, *_: setattr(model, "more", nn.Linear(1, 1))}, 1, "7 layers"),
    ({"generate": Mock(side_effect=FloatingPointError("nan"))}, 2, "autoencoder.py train: error: nan")])
def test_work_ends_in_success_or_in_one_line_that_says_why_not(tmp_path, capfd, changes, status, outcome):
    usual = {"load_data": lambda *_: FONT_DIGITS, "train": Mock(), "pca_error": lambda *_: 0.02}
    with patch.multiple(ae, **usual | changes):
        ended, out, err = call(f"--pics {tmp_path}", capfd)
    assert ended == status and len(err) == (status > 0)
    assert (err or out)[-1].startswith(outcome)


def test_import_has_no_side_effects(tmp_path):
    code = (f"import os, torch; os.chdir({str(tmp_path)!r}); state = torch.get_rng_state(); "
            "import autoencoder; assert torch.equal(state, torch.get_rng_state())")
    done = run("-c", code, PYTHONPATH=str(HERE))
    assert (done.returncode, done.stdout + done.stderr, os.listdir(tmp_path)) == (0, "", [])


# ==== The evidence of the answers =================================================================
#
# ANSWERS.md states figures and claims; the tests named test_answer_… measure them again. Tools first, then
# a section for each question: its experiments, its claims, its unit tests.

ANSWERS = HERE / "ANSWERS.md"
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "0,1,2").split(",")]  # of all that is random
RESULTS = {}  # (experiment, job) → what it returned


@functools.cache
def splits():
    return ae.Splits(ae.load_data(MNIST_FOLDER))


@functools.cache
def processes():
    pool = multiprocessing.get_context("spawn").Pool(min(ae.usable_cores(), 8), torch.set_num_threads, (1,))
    atexit.register(pool.terminate)
    return pool


def run_job(experiment, job):
    start = time.perf_counter()
    return experiment(*job), time.perf_counter() - start


@pytest.fixture
def measure(capfd):
    """measure(experiment, jobs): `experiment(*job)` for each tuple of `jobs`, by default one for each seed.

    Runs in processes of one thread each, says on the terminal what is done, and measures nothing twice.
    """
    if not HAS_MNIST:
        pytest.skip(NO_MNIST)

    def run(experiment, jobs=None):
        jobs = [(seed,) for seed in SEEDS] if jobs is None else list(jobs)
        todo = [job for job in jobs if (experiment.__name__, job) not in RESULTS]
        pending = [processes().apply_async(run_job, (experiment, job)) for job in todo]
        for number, (job, result) in enumerate(zip(todo, pending), 1):
            RESULTS[experiment.__name__, job], seconds = result.get()
            what = *(part for part in job if not isinstance(part, tuple)),  # but tensors
            say(f"{experiment.__name__}{what}: {number} of {len(todo)}, {seconds:.0f} s", capfd)
        return [RESULTS[experiment.__name__, job] for job in jobs]
    return run


def test_without_mnist_no_measurement_starts(monkeypatch, request):
    monkeypatch.setitem(globals(), "HAS_MNIST", False)
    with pytest.raises(pytest.skip.Exception, match="`python autoencoder.py` downloads it"):
        request.getfixturevalue("measure")


# Networks side by side are a stack: a list of weights (count, in, out) and biases (count, 1, out).

def make_stack(sizes, count, gain=1):
    return [part for a, b in zip(sizes, sizes[1:])
            for part in (torch.randn(count, a, b) * (gain / a) ** 0.5, torch.zeros(count, 1, b))]


def run_stack(net, x, dropout=0.0):
    """Images (n, in) for all alike, or (count, n, in), → (count, n, out), with ReLU between the layers."""
    x = x.expand(len(net[0]), -1, -1)
    for i in range(0, len(net), 2):
        x = torch.baddbmm(net[i + 1], F.dropout(F.relu(x), dropout) if i else x, net[i])
    return x


@torch.enable_grad()
def minimise(loss, tensors, steps, rate):
    """Adam on `tensors`, its rate falling linearly to 0."""
    tensors = [part.detach().clone().requires_grad_() for part in tensors]
    optimizer = torch.optim.Adam(tensors, lr=rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(tensors).backward()
        optimizer.step()
    return [part.detach() for part in tensors]


def rank_correlation(a, b):
    """Spearman's, of values without ties."""
    ranks = [torch.as_tensor(values).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def auroc(high, low):
    """The chance that a value of `high` exceeds one of `low`, ties counting half."""
    low = low.sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return below.double().mean().item() / 2 / len(low)


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided, from two values up


def assert_claim(what, values, above=-math.inf, below=math.inf):
    """Assert that the 95 % interval of the mean of `values`, mostly paired differences, is in the bounds."""
    values, degrees = np.asarray(values, dtype=float), len(values) - 1
    t = T95[degrees - 1] if degrees <= len(T95) else 1.96 + 2.7 / degrees
    mean, half = values.mean(), t * values.std(ddof=1) / len(values) ** 0.5
    assert above < mean - half and mean + half < below, (
        f"{what}: {mean:.4g} ± {half:.2g} (95 %), not in {above:.4g} to {below:.4g}: {np.round(values, 4)}")


def assert_each(values, above=-math.inf, below=math.inf):
    assert all(above < value < below for value in values), (values, above, below)


def stated(sentence):
    """The numbers that stand in ANSWERS.md where `sentence`, which must be there, has a #."""
    pattern = re.escape(" ".join(sentence.split())).replace(r"\#", r"(-?\d[\d,]*(?:\.\d+)?)")
    found = re.search(pattern, " ".join(ANSWERS.read_text(encoding="utf-8").split()))
    assert found, f"ANSWERS.md does not say: {sentence}"
    return [figure(number) for number in found.groups()]


def check_stated(sentence, *measured, within=None):
    """Assert that the figures in `sentence` of ANSWERS.md are the means of what was measured, each up to
    `within`, or up to the tolerance that stands behind it."""
    numbers = stated(sentence)
    pairs = [(number, within) for number in numbers] if within else zip(numbers[::2], numbers[1::2])
    for (written, tolerance), values in zip(pairs, measured, strict=True):
        assert abs(written - np.mean(values)) <= tolerance, (sentence, written, np.mean(values))


TOLERANCE = "other seeds, ±"  # the last row of a table: how far other seeds move a figure, as 0.01 or as 5 %


def written_table(name):
    """(row, column) → cell of the Markdown table after <!-- name --> in ANSWERS.md."""
    found = re.search(rf"<!-- {name} -->\s*\n((?:\|.*\n)+)", ANSWERS.read_text(encoding="utf-8"))
    header, _, *rows = [[cell.strip().replace("**", "") for cell in line.strip()[1:-1].split("|")]
                        for line in found[1].splitlines()]
    return {(row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)}


def figure(cell):
    return float(cell.replace(",", "").replace("−", "-"))


def allowance(value, limit):
    """How far other seeds may move a written `value`, by the last row of its column."""
    return abs(value) * float(limit[:-1]) / 100 if limit.endswith("%") else float(limit)


def differences(written, measured):
    """Sentences on what is written, (row, column) → cell, and not measured, row → column → value."""
    expected = {(row, column) for row, cells in measured.items() for column in cells}
    found = {key for key, cell in written.items() if cell and key[0] != TOLERANCE}
    wrong = [f"{key} is only in one of text and measurement" for key in found ^ expected]
    for row, column in found & expected:
        cell = figure(written[row, column])
        allowed = allowance(cell, written[TOLERANCE, column])
        if not abs(cell - measured[row][column]) <= allowed + 1e-12:
            wrong.append(f"{row}, {column}: {cell} ± {allowed:.2g} is written, {measured[row][column]:.4g} "
                         "was measured")
    return wrong


def check_table(name, records):
    """Assert that table `name` in ANSWERS.md is the mean of `records`, row → column → value."""
    means = {row: {column: np.mean([record[row][column] for record in records]) for column in cells}
             for row, cells in records[0].items()}
    wrong = differences(written_table(name), means)
    lines = [f"| {row} | {' | '.join(f'{column} {value:.4g}' for column, value in cells.items())} |"
             for row, cells in means.items()]
    assert not wrong, "\n".join([f"table {name}:", *wrong, "measured:", *lines])


# ---- Autoencoder 1 and 2 -------------------------------------------------------------------------

GOOD = {  # settings that a person might hesitate between; all have a code of 20 numbers
    "default": ae.DEFAULT, "784-400-20": ae.PLAIN, "depth 2": ae.DEFAULT | {"depth": 2},
    "cross-entropy": ae.DEFAULT | {"loss": "cross-entropy"}}
SETTINGS = GOOD | {"width 128": ae.DEFAULT | {"width": 128}}
LOOKED_AT = ("default", "784-400-20", "width 128")  # whose digits all ways of looking judge
COUNT = 5000  # images on each side of a comparison


@functools.cache
def bench(seed):
    """Held-out images in two random halves, the first of them the reference, and networks that see them."""
    images, labels = (torch.cat(parts) for parts in zip(splits().choice, splits().confirmation))
    torch.manual_seed(seed)
    first, second = torch.randperm(len(images)).split(COUNT)
    networks = [ae.train_features(*splits().features, seed), ae.Features().eval().requires_grad_(False)]
    return SimpleNamespace(
        networks=networks, reference=ae.Reference(networks[0], images[first], splits().train[0]),
        hidden=[[network.hidden(images[half]) for half in (first, second)] for network in networks],
        loader=[(images[first], labels[first])], real=images[second], labels=labels[second])


def frechet(images, seed, half=0, network=0):
    hidden = bench(seed).networks[network].hidden(images)
    return ae.frechet_distance(hidden, bench(seed).hidden[network][half])


def trained(name, seed, number):
    """One epoch, the training `number` of a setting, with initialisation and order of its own."""
    start = 1000 * seed + 100 * number + list(SETTINGS).index(name)
    return ae.train_setting(SETTINGS[name], start, 1, *splits().train)


def draw(model, seed, count=COUNT, components=100, codes=10_000):
    """Digits from a mixture over the codes of the first training images."""
    return ae.generate(model, ae.fit_generator(model, splits().train[0], components, codes), count, seed)


def study(seed, name):
    """A setting trained twice, each training drawn from twice: scores on both halves; of some, more."""
    if name == "drawn":
        return train_drawn(seed)
    found = {"scores": [], "errors": [], "looks": []}
    for number in (0, 1):
        model = trained(name, seed, number)
        draws = draw(model, seed, 2 * COUNT).split(COUNT)
        found["scores"].append([[frechet(digits, seed, half) for half in (0, 1)] for digits in draws])
        found["errors"].append(ae.evaluate(model, bench(seed).loader)[1])
        if name in LOOKED_AT:
            single = frechet(draw(model, seed, components=1), seed)
            found["looks"] += [[scores[0], frechet(digits, seed, network=1), single]
                               for digits, scores in zip(draws, found["scores"][-1])]
    if name == "default":
        found |= {"gamed": game(model, seed)} | judge(draws[0], seed)
    return found


def train_drawn(seed):
    """Squared errors and Fréchet distances of five settings from the search's space, trained briefly."""
    found = []
    for trial in range(1, 6):
        model = ae.train_setting(ae.draw_settings(trial, seed), seed, 1 / 3, *splits().train)
        found.append((ae.evaluate(model, bench(seed).loader)[1], frechet(draw(model, seed), seed)))
    return np.transpose(found)


@torch.no_grad()
def game(model, seed):
    """Table `gamed`: digits from more and more Gaussians over the same 2,000 codes."""
    rows = {"20": (20, 2000), "100": (100, 2000), "2,000": (2000, 2000), "100 over 10,000": (100, 10_000)}
    for row, (components, codes) in rows.items():
        digits, rebuilt = draw(model, seed, COUNT, components, codes), model(splits().train[0][:codes])
        score, _, ratio = bench(seed).reference.measure(digits).values()
        usual = ae.nearest_distance(model(bench(seed).real[::10]), rebuilt)
        rows[row] = {"Fréchet": score, "distance ratio": ratio,
                     "ratio to reconstructions": ae.nearest_distance(digits[::10], rebuilt) / usual}
    return rows


def image_sets(real, labels, copies):
    """Images that a score should tell from new digits, and some that it should not."""
    weights = torch.tensor([1.0, 2, 1]) / 4  # along rows and columns
    blurred = F.conv2d(real.view(-1, 1, 28, 28), weights.outer(weights).view(1, 1, 3, 3), padding=1)
    glued, tenth = real.clone().view(-1, 28, 28), len(real) // 10
    glued[:tenth, :, 14:] = glued.roll(1, 0)[:tenth, :, 14:]  # the right half of the image before
    without_4 = real[labels != 4].repeat(2, 1)[:len(real)]
    moved = F.pad(copies.view(-1, 28, 28), (1, -1))
    return {"real digits": real, "real, blurred": blurred.flatten(1), "real, a fifth dimmer": 0.8 * real,
            "real, one in ten glued": glued.flatten(1), "real, without 4": without_4,
            "copies of training digits": copies, "copies, moved one pixel": moved.flatten(1)}


def density_and_coverage(real, radii, generated, k=5):
    """Naeem et al. 2020: how many balls around real features hold a generated one, over k; share that do."""
    inside = torch.cdist(real, generated) < radii
    return inside.sum(0).float().mean().item() / k, inside.any(1).float().mean().item()


def frechet_bias(features):
    """b: two samples of n from a Gaussian with the features' covariance C are b / n apart on average.

    To first order in 1/n: 2 tr C from the means, ½ Σ n E[Δ_ij²] / (λ_i + λ_j) from the difference Δ
    of the covariances, where n E[Δ_ij²] = 2 λ_i λ_j (1 + [i = j]) in the eigenvectors of C (values λ).
    """
    values = torch.linalg.eigvalsh(torch.cov(features.double().T)).clamp(min=1e-12)
    pairs = values.outer(values) / (values + values[:, None])
    return (2.5 * values.sum() + pairs.sum()).item()  # pairs i = j count twice


def judge(digits, seed):
    """The default's digits beside image sets: table `judged`, what networks see and read; bias by number."""
    seen, rows = bench(seed), {}
    real, other = seen.hidden[0]
    radii = torch.cdist(real, real).topk(6, largest=False).values[:, 5:]  # to the fifth neighbour
    sets = image_sets(seen.real, seen.labels, splits().train[0][:COUNT]) | {"default autoencoder": digits}
    for name, images in sets.items():
        score, overlap, ratio = seen.reference.measure(images).values()
        density, coverage = density_and_coverage(real, radii, seen.networks[0].hidden(images))
        rows[name] = {"Fréchet": score, "density": density, "coverage": coverage, "class overlap": overlap,
                      "distance ratio": ratio}
    read = [100 * (seen.networks[0](sets[name]).argmax(1) == seen.labels).float().mean().item()
            for name in ("real, blurred", "real digits")]
    bias = {n: np.mean([*map(ae.frechet_distance, real.split(n), other.split(n))]) for n in (250, 500)}
    return {"judged": rows, "read": read, "bias": bias, "b": frechet_bias(real),
            "seen": {name: [rows[name]["Fréchet"], frechet(sets[name], seed, network=1)]
                     for name in ("real, blurred", "real, without 4")}}


@pytest.fixture
def studied(measure):
    """By seed: what `study` found of each setting, and `train_drawn`."""
    names = (*SETTINGS, "drawn")
    found = iter(measure(study, itertools.product(SEEDS, names)))
    return [{name: next(found) for name in names} for _ in SEEDS]


def by_column(records):
    """For each column of a table: row → values by seed."""
    return [{row: np.array([record[row][column] for record in records]) for row in records[0]}
            for column in next(iter(records[0].values()))]


def least_of(count):
    """Expected minimum of `count` independent standard normal draws: −∫ z d(Φ(z)^count)."""
    z = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    return -torch.trapezoid(z, torch.special.ndtr(z) ** count).item()


def luck_rows(x):
    """Table `luck` from log scores (setting, training, draws, half): each again, in part fresh."""
    fresh, rows = {"same digits, other held-out images": 3, "same training, fresh digits": 2,
                   "fresh training, same held-out images": (1, 2), "all fresh": (1, 2, 3)}, {}
    for row, axes in fresh.items():
        change = np.flip(x, axes) - x
        change -= change.mean(0)  # what moves all settings alike
        variance = np.square(change).mean() / 2 * len(x) / (len(x) - 1)
        winners = np.take_along_axis(change, x.argmin(0)[None], 0)
        rows[row] = {"luck of a score, %": 100 * variance ** 0.5, "excess measured, %": 100 * winners.mean()}
    return rows


def test_answer_autoencoder1_luck(studied):
    rows = [luck_rows(np.log([record[name]["scores"] for name in GOOD])) for record in studied]
    _, draws, _, every = by_column(rows)[0].values()
    for row, luck in by_column(rows)[0].items():
        for record in rows:
            record[row]["excess on paper, %"] = -least_of(len(GOOD)) * luck.mean() ** 2 / every.mean()
    check_table("luck", rows)
    assert stated("#σ for n = 2, #σ for 4, #σ for 27") == [round(-least_of(n), 2) for n in (2, 4, 27)]
    check_stated("σ is # % (± #)", every)
    sigma, _, needed, shown, least, drawn, fewer = stated(
        "σ is # % (± #): # trainings of each show a gap of 5 %; three of each, with a t-test, only a ratio "
        "of #. But drawing 5,000 digits alone makes at least # % of the variance, # % in the table: with ten "
        "times the digits, # trainings")
    assert 100 * (draws.mean() / every.mean()) ** 2 > least
    assert needed == pytest.approx(2 * (1.96 + 0.84) ** 2 * (sigma / 5) ** 2, rel=0.05)
    assert fewer == pytest.approx(needed * (1 - 0.9 * drawn / 100), rel=0.05)
    tie, shows = (np.exp(t * (2 / 3) ** 0.5 * sigma / 100) for t in (2.776, 2.776 + 0.941))  # Student's t
    assert [*stated("Call a ratio below # a tie"), shown] == pytest.approx([tie, shows], rel=0.02)


def test_answer_autoencoder1_ranking(studied):
    wide, good, again = [], [], []
    for record in studied:
        x = np.log([record[name]["scores"] for name in GOOD])  # (setting, training, draws, half)
        x = x.reshape(len(GOOD), -1)
        errors = np.array([record[name]["errors"] for name in GOOD]).repeat(4, axis=1)
        good.append(np.mean([*map(rank_correlation, errors.T, x.T)]))
        again.append(np.mean([*map(rank_correlation, x.T, x.T[::-1])]))  # in reverse, all is fresh
        wide.append(rank_correlation(*record["drawn"]))
    check_stated("rank correlation # (± #). Over the four good ones (one epoch) it is # (± #), lower with "
                 "every seed; between the scores of their two trainings, # (± #)", wide, good, again)
    assert (np.array(wide) > good).all()


def test_answer_autoencoder1_gamed(studied):
    records = [record["default"]["gamed"] for record in studied]
    check_table("gamed", records)
    score, ratio, sharp = by_column(records)
    assert_claim("a Gaussian for each code scores better", score["2,000"] - score["20"], below=0)
    assert_claim("and passes the guard", ratio["2,000"], above=ae.MIN_RATIO)
    assert_claim("not the sharper one", sharp["2,000"], below=ae.MIN_RATIO)
    for row in ("20", "100 over 10,000"):
        assert_claim(f"which passes {row}", sharp[row], above=ae.MIN_RATIO)


def test_answer_autoencoder2_judged(studied):
    records = [record["default"]["judged"] for record in studied]
    check_table("judged", records)
    score, density, _, overlap, ratio = by_column(records)
    real, blurred, dim, glued, without_4, copies, moved, default = score
    least = stated("at least # and # times the distance of the autoencoder's")
    for row, times in zip((blurred, dim), least):
        assert_each(score[row] / score[default], above=times)
    for row in (real, glued, copies):
        assert (score[row] < score[default]).all(), row
    assert_claim("density sides with the eye", density[blurred] - density[default], above=0)
    for row in (blurred, dim):
        assert (density[row] > density[real]).all(), row
    assert stated("class overlap of # and a distance ratio of # or more") == [ae.MIN_OVERLAP, ae.MIN_RATIO]
    assert_claim("the guard sees copies", ratio[copies], below=ae.MIN_RATIO)
    for row in (real, default, moved):
        assert_claim(f"the guard accepts: {row}", ratio[row], above=ae.MIN_RATIO)
    for row in (real, default, without_4):
        assert_claim(f"so does that of classes: {row}", overlap[row], above=ae.MIN_OVERLAP)
    *percents, tolerance = stated("reads # % of the blurred and # % of the sharp ones correctly (± #)")
    assert np.allclose(np.mean([record["default"]["read"] for record in studied], 0), percents, 0, tolerance)


def test_answer_autoencoder2_features_and_sampler(studied):
    views = with_labels, untrained, single = "10,000 labels", "untrained", "one Gaussian"
    rows, times = [], []
    for record in studied:
        seen = record["default"]["seen"] | {name: np.mean(record[name]["looks"], 0) for name in LOOKED_AT}
        default = seen.pop("default")
        times.append(default[-1] / default[0])
        rows.append({row: dict(zip(views, values / default[:len(values)])) for row, values in seen.items()})
    check_table("looked", rows)
    check_stated("multiplies the default's distance by # (± #)", times)
    seen, hardly = (np.log([r["real, without 4"][view] for r in rows]) for view in (with_labels, untrained))
    assert_each(seen, above=0)  # a network with labels sees that 4 is missing, one without hardly
    assert_each(seen - hardly, above=0)
    for plain, narrow in ((r["784-400-20"], r["width 128"]) for r in rows):
        assert narrow[with_labels] > plain[with_labels] and narrow[single] < plain[single]


def test_answer_autoencoder2_numbers_of_images_and_answers(studied):
    records = [record["default"] for record in studied]
    check_stated("b is # (± #): ", [record["b"] for record in records])
    b, _, *paper = stated("b is # (± #): # at 250 images a side, # at 500, # at 5,000")
    assert paper == pytest.approx([b / n for n in (250, 500, 5000)], rel=0.03)
    *measured, percent = stated("Measured: # and # (± # %)")
    found = [np.mean([record["bias"][n] for record in records]) for n in (250, 500)]
    assert found == pytest.approx(measured, rel=percent / 100)
    many = [record["judged"]["default autoencoder"]["Fréchet"] for record in records]
    assert_each([r["bias"][500] - m for r, m in zip(records, many)], above=0)  # 500 real digits look worse
    for share, answers in zip((0.6, 0.55), stated("# answers if 60 % prefer one, # if 55 % do")):
        assert round(((1.96 * 0.5 + 0.84 * (share * (1 - share)) ** 0.5) / (share - 0.5)) ** 2) == answers


def pictures(folder):
    """The pictures of both answers, run by hand; one seed."""
    seed, train = SEEDS[0], splits().train[0]
    model = trained("default", seed, 0)
    digits, gamed = draw(model, seed, 20), draw(model, seed, 20, 2000, 2000)
    nearest = [train[torch.cdist(images, train).argmin(1)] for images in (digits, gamed)]
    sets = image_sets(bench(seed).real, bench(seed).labels, train[:COUNT]).values()
    for name, rows in {"copies": [digits, nearest[0], gamed, nearest[1]], "judged": [*sets, digits]}.items():
        images = torch.cat([row[:20] for row in rows]).view(-1, 1, 28, 28)
        save_image(images, f"{folder}/{name}.png", nrow=20, pad_value=0.5)


def test_luck_and_excess_are_what_was_put_in():
    assert least_of(2) == pytest.approx(-math.pi ** -0.5, abs=1e-6)
    random, found = np.random.default_rng(0), []
    for _ in range(500):  # of training, draws and half; the halves also move all settings alike
        x = (0.3 * random.normal(size=(4, 2, 1, 1)) + 0.2 * random.normal(size=(4, 2, 2, 1))
             + 0.1 * random.normal(size=(4, 2, 2, 2)) + random.normal(size=2))
        found.append([list(row.values()) for row in luck_rows(x).values()])
    luck, excess = np.transpose(found, (2, 0, 1)) / 100  # (random scores, rows)
    variance = np.array([0.01, 0.05, 0.14, 0.14])  # of what differs in a row
    assert np.square(luck).mean(0) == pytest.approx(variance, rel=0.1)
    assert excess.mean(0) == pytest.approx(-least_of(4) * variance / 0.14 ** 0.5, rel=0.1)


def test_density_and_coverage_of_points_on_a_line():
    real, generated = torch.tensor([[0.0], [1], [3]]), torch.tensor([[0.5], [9]])
    radii = torch.tensor([[1], [1], [2]])
    assert density_and_coverage(real, radii, generated, k=1) == pytest.approx((2 / 2, 2 / 3))


def test_bias_is_that_of_gaussian_samples():
    torch.manual_seed(0)
    spread = torch.tensor([3.0, 1, 0.5])
    found = np.mean([ae.frechet_distance(*spread * torch.randn(2, 500, 3)) for _ in range(500)])
    assert frechet_bias(spread * torch.randn(200_000, 3)) / 500 == pytest.approx(found, rel=0.1)


def test_changed_images_are_what_they_are_called():
    images = torch.rand(10, 784)
    real, blurred, _, glued, no_4, copies, moved = (
        rows.view(-1, 28, 28) for rows in image_sets(images, torch.arange(10), torch.ones(1, 784)).values())
    weights = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    assert_close(blurred[3, 9, 9], (real[3, 8:11, 8:11] * weights).sum())
    assert torch.equal(glued[1:], real[1:]) and torch.equal(glued[0, :, :14], real[0, :, :14])
    assert torch.equal(glued[0, :, 14:], real[9, :, 14:]) and not (no_4 == real[4]).all((1, 2)).any()
    assert torch.equal(moved[..., 1:], copies[..., 1:]) and not moved[..., 0].any()


# ---- Other 1: model uncertainty ------------------------------------------------------------------

LABELLED, COPIES = 2000, 20_000  # images with labels; transformed copies of them, and inputs without labels
MEMBERS, SAMPLES, PRIOR, DROPOUT = 5, 10, 30.0, 0.2  # Laplace samples of a member, the precision of its prior
STEPS, STUDENT_STEPS, BATCH, RATE, STUDENT_RATE = 4000, 2500, 100, 4e-3, 8e-3
LABEL_WEIGHT, SHARE_WEIGHT = 0.3, 3.0  # of a label in a target; of the share's loss beside the mean's
RECIPE = "student: mean and share"


def warp(images, angle, wide, high, right, down):
    """Images turned anticlockwise, scaled and shifted, by numbers for each image."""
    affine = torch.stack([(1 + wide) * angle.cos(), -(1 + high) * angle.sin(), right,
                          (1 + wide) * angle.sin(), (1 + high) * angle.cos(), down], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 28, 28), grid, align_corners=False)


def transform(images, noise):
    """Turned by up to 15°, scaled and shifted by up to 7 %, made smaller, and noise up to `noise` added."""
    angle = (torch.rand(len(images)) * 2 - 1) * math.radians(15)
    small = F.avg_pool2d(warp(images, angle, *(torch.rand(4, len(images)) * 2 - 1) * 0.07), 2).flatten(1)
    return (small + noise * torch.rand(len(small), 1) * torch.randn_like(small)).clamp(0, 1)


def transfer(images):
    """COPIES without labels: 4 in 10 blends of two images, 1 in 10 uniform noise of random brightness."""
    first, second = images[torch.randint(len(images), (2, COPIES))]
    share = torch.rand(COPIES, 1).where(torch.arange(COPIES)[:, None] < 4 * COPIES // 10, 1.0)
    x = transform(share * first + (1 - share) * second, 0.2)
    x[-COPIES // 10:] = torch.rand(COPIES // 10, 1) * torch.rand(COPIES // 10, x.shape[1])
    return x


def stack_halves(images, labels):
    """Upper halves of the first half of the images on lower halves of the others, of other classes."""
    n = len(images) // 2
    return torch.cat([images[:n, :392], images[n:2 * n, 392:]], dim=1)[labels[:n] != labels[n:2 * n]]


def fit(start, loss, inputs, targets, steps, rate, dropout=0.0):
    """Networks trained from `start` on batches; each has its own order."""
    def draw_batches():
        while True:
            order = torch.stack([torch.randperm(len(inputs)) for _ in start[0]])
            yield from order.split(BATCH, dim=1)

    def of_batch(net):
        picked = next(batches)
        return loss(run_stack(net, inputs[picked], dropout), targets[picked])
    batches = draw_batches()
    return minimise(of_batch, start, steps, rate)


def last_inputs(net, x):
    """What the last layers multiply: the last hidden units and a 1, (members, n, width + 1)."""
    return F.pad(F.relu(run_stack(net[:4], x)), (0, 1), value=1.0)


def laplace(net, inputs, images):
    """SAMPLES last layers a network, for `images`: Kronecker-factored Laplace (Ritter et al. 2018)."""
    h, p = last_inputs(net, inputs), run_stack(net, inputs).softmax(-1)
    (a, left), (b, right) = (torch.linalg.eigh(factor / len(inputs)) for factor in (
        h.mT @ h, torch.diag_embed(p.sum(1)) - p.mT @ p))
    deviation = (images * a.clamp(min=0)[:, :, None] * b.clamp(min=0)[:, None] + PRIOR) ** -0.5
    noise = deviation[:, None] * torch.randn(len(a), SAMPLES, *deviation.shape[1:])
    return torch.cat(net[4:], 1)[:, None] + left[:, None] @ noise @ right.mT[:, None]


def sampled(net, weights, x):
    """Images → logits (members * SAMPLES, n, 10)."""
    return (last_inputs(net, x)[:, None] @ weights).flatten(0, 1)


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def averaged(z):
    """Ten outputs a network: log of the mean p, and the mutual information of class and network."""
    log_p = z.unflatten(-1, (-1, 10)).movedim(2, 0).flatten(0, 1).log_softmax(-1)
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return mean, entropy(mean) - entropy(log_p).mean(0)


def single(z):
    """Knowledge is the share of an eleventh output in the entropy; without that output, the entropy."""
    log_p = z[0, :, :10].log_softmax(-1)
    return log_p, entropy(log_p) * (z[0, :, 10].sigmoid() if z.shape[2] > 10 else 1)


def as_dirichlet(z):
    """The mutual information is that of class and p under Dir(exp(z) + 1)."""
    alpha = z[0].exp() + 1
    total = alpha.sum(-1, keepdim=True)
    data = -(alpha / total * ((alpha + 1).digamma() - (total + 1).digamma())).sum(-1)
    return z[0].log_softmax(-1), entropy((alpha / total).log()) - data


def mean_loss(z, p):
    """Cross-entropy to labels or the teacher's mean, or of heads to members; summed over networks."""
    return -(p * z.view_as(p).log_softmax(-1)).sum(-1).mean() * len(z)


def share_loss(z, target):
    """Besides the mean: cross-entropy of the share of knowledge in the total, weighted with the total."""
    knowledge, data = target[..., 10], target[..., 11]
    share = knowledge * F.logsigmoid(z[..., 10]) + data * F.logsigmoid(-z[..., 10])
    return mean_loss(z[..., :10], target[..., :10]) - SHARE_WEIGHT * share.mean()


def dirichlet_loss(z, target):
    """KL(Dir(α) ‖ Dir(β)) / β₀ + constant: α = exp(z) + 1, β = β₀ p̄ + 1 (Ryabinin 2021)."""
    precision = (9 / (2 * target[..., 10].clamp(min=1e-9))).clamp(max=1e4)
    alpha = z.exp() + 1
    expected = alpha.digamma() - alpha.sum(-1, keepdim=True).digamma()
    dirichlet = torch.distributions.Dirichlet(alpha, validate_args=False)
    return -((target[..., :10] * expected).sum(-1) + dirichlet.entropy() / precision).mean()


def teach(net, weights, x, labels):
    """Mean p, members' p (both blended with `labels`), knowledge, data, Σ p̄ (ln p̄ − mean ln p)."""
    parts = []
    for part in x.split(1000):
        log_p = sampled(net, weights, part).log_softmax(-1)
        p = log_p.exp()
        mean, members, data = p.mean(0), p.unflatten(0, (MEMBERS, SAMPLES)).mean(1), entropy(log_p).mean(0)
        spread = (mean * (mean.log() - log_p.mean(0))).sum(-1)
        parts.append((mean, members.movedim(0, 1), entropy(mean.log()) - data, data, spread))
    mean, members, *numbers = map(torch.cat, zip(*parts))
    mean[:len(labels)].lerp_(labels, LABEL_WEIGHT)
    members[:len(labels)].lerp_(labels[:, None], LABEL_WEIGHT)
    return mean, members, *(number[:, None] for number in numbers)


def images_of(seed):
    """Images and labels: to train, for temperatures, for sets; and images that are used without labels."""
    order = torch.randperm(40_000, generator=torch.Generator().manual_seed(seed))[:14_000]
    return [[part[picked] for part in splits().train]
            for picked in order.split([LABELLED, 1000, 1000, 10_000])]


def draw_copies(seed):
    """COPIES of the labelled images, transformed, and p of their labels."""
    images, labels = images_of(seed)[0]
    return transform(images.repeat(10, 1), 0.1), F.one_hot(labels, 10).float().repeat(10, 1)


def train_members(seed, members, width):
    torch.manual_seed(seed)
    start = make_stack((196, width, width, 10), members, gain=2)
    return tuple(fit(start, mean_loss, *draw_copies(seed), STEPS, RATE, DROPOUT))


def train_methods(seed, nets, wide):
    """Row → (images → logits, logits → log p (n, 10) and knowledge (n,)), from trained networks."""
    (images, _), _, _, (unlabelled, _) = images_of(seed)
    torch.manual_seed(seed + 1)
    copies, labels = draw_copies(seed)
    first, weights = [part[:1] for part in nets], laplace(nets, copies[:2 * LABELLED], LABELLED)
    inputs = torch.cat([copies, transfer(torch.cat([images, unlabelled]))])
    mean, members, knowledge, data, spread = teach(nets, weights, inputs, labels)
    longer = fit(first, mean_loss, copies, labels, STUDENT_STEPS, STUDENT_RATE, DROPOUT)
    methods = {
        "one network": (partial(run_stack, first), single),
        "one, trained as long": (partial(run_stack, longer), single),
        "one, twice as wide": (partial(run_stack, wide), single),
        "one, last-layer Laplace": (partial(sampled, first, weights[:1]), averaged),
        "ensemble": (partial(run_stack, nets), averaged),
        "ensemble, Laplace": (partial(sampled, nets, weights), averaged)}
    for row, outputs, loss, targets, read in (
            ("student: heads", 10 * MEMBERS, mean_loss, members, averaged),
            ("student: mean", 10, mean_loss, mean, single),
            ("student: Dirichlet", 10, dirichlet_loss, torch.cat([mean, spread], 1), as_dirichlet),
            (RECIPE, 11, share_loss, torch.cat([mean, knowledge, data], 1), single)):
        last = [F.pad(part.repeat(1, 1, outputs // 10), (0, outputs % 10)) for part in first[4:]]
        net = fit(first[:4] + last, loss, inputs, targets, STUDENT_STEPS, STUDENT_RATE)
        methods[row] = partial(run_stack, net), read
    return methods


def calibration_error(log_p, labels, bins=15):
    """Mean gap of confidence and accuracy over equal bins of confidence, by images (Guo et al. 2017)."""
    confidence, guess = log_p.exp().max(-1)
    gaps = torch.zeros(bins).index_add_(
        0, (confidence * bins).long().clamp(max=bins - 1), (guess == labels).float() - confidence)
    return gaps.abs().sum().item() / len(labels)


def doubt(seed, nets, wide):
    """All methods, trained and measured once: row → column → value."""
    methods = train_methods(seed, nets, wide)
    _, (valid, valid_labels), (held, held_labels), _ = images_of(seed)
    digits, truth = splits().test
    turned = warp(digits[:5000], torch.tensor(math.radians(30)).expand(5000), *torch.zeros(4, 5000))
    shown = [F.avg_pool2d(each.view(-1, 1, 28, 28), 2).flatten(1)
             for each in (valid, held, digits, turned, stack_halves(digits, truth))] + [torch.rand(1000, 196)]
    sizes = [len(each) for each in shown]
    seen = {row: [torch.cat(part) for part in zip(*(read(run(x)) for x in torch.cat(shown).split(1000)))]
            for row, (run, read) in methods.items()}
    rows, teacher = {}, seen["ensemble, Laplace"][1].split(sizes)
    for row, (log_p, knowledge) in seen.items():
        rates = torch.logspace(-1, 1, 101, base=4).tolist()
        rate = min(rates, key=lambda rate: F.cross_entropy(log_p[:1000] / rate, valid_labels).item())
        log_p = (log_p / rate).log_softmax(-1)
        _, at_held, at_digits, at_turned, _, _ = log_p.split(sizes)
        least = at_held.gather(1, held_labels[:, None]).sort(0).values[9]
        record = rows[row] = {"size": (at_digits >= least).sum(-1).float().mean().item(),
                              "ECE": calibration_error(at_digits, truth)}
        for each, where in ((at_digits, ""), (at_turned, ", turned")):
            of_truth = each.gather(1, truth[:len(each), None])
            record[f"NLL{where}"] = -of_truth.mean().item()
            record[f"missed{where}"] = (of_truth < least).float().mean().item()
        for values, of in ((knowledge, ""), (entropy(log_p), ", of entropy")):
            _, _, upright, _, glued, noise = parts = values.split(sizes)
            ranks = list(map(rank_correlation, parts[2:5], teacher[2:5]))
            found = {"rank correlation": np.mean(ranks), "upright": ranks[0], "shifted": np.mean(ranks[1:]),
                     "AUROC, glued": auroc(glued, upright), "AUROC, noise": auroc(noise, upright)}
            record |= {f"{name}{of}": value for name, value in found.items()}
    return rows


def doubts(measure):
    """The rows of `doubt` for each seed."""
    nets = measure(train_members, [(seed, *size) for size in ((MEMBERS, 128), (1, 256)) for seed in SEEDS])
    return measure(doubt, list(zip(SEEDS, nets, nets[len(SEEDS):])))


def gains(records, column, other, other_column=None, row=RECIPE):
    """For each seed, how far the recipe, or `row`, lies above `other`."""
    return [record[row][column] - record[other][other_column or column] for record in records]


def test_answer_uncertainty_methods(measure):
    columns = ("NLL", "NLL, turned", "AUROC, glued", "AUROC, noise", "rank correlation")
    only_in_the_text = ("student: mean", "student: heads")
    check_table("uncertainty_methods", [
        {row: {column: cells[column] for column in columns} for row, cells in record.items()
         if row not in only_in_the_text} for record in doubts(measure)])


def test_answer_uncertainty_prediction(measure):
    records = doubts(measure)
    nll, error, glued = stated(
        "Its NLL is below that network's, and at most # above the plain ensemble's (without Laplace); its "
        "calibration error (15 bins [3]) is at most # above. It detects glued digits at most # worse on "
        "average")
    assert_each(gains(records, "NLL", "one network"), below=0)
    assert_each(gains(records, "NLL", "ensemble"), below=nll)
    assert_each(gains(records, "ECE", "ensemble"), below=error)
    assert_claim("glued", gains(records, "AUROC, glued", "ensemble"), above=-glued)
    ours, ensemble = (np.mean(gains(records, "NLL", "one network", row=row)) for row in (RECIPE, "ensemble"))
    stated("it keeps at least half")
    assert ours / ensemble > 0.5
    [near] = stated("A student of the mean alone has an NLL within # of the student's.")
    assert_each(gains(records, "NLL", "student: mean"), above=-near, below=near)
    [price] = stated("Laplace on each member costs the ensemble at most # in NLL on average")
    assert_claim("Laplace", gains(records, "NLL", "ensemble", row="ensemble, Laplace"), below=price)


def test_answer_uncertainty_knowledge(measure):
    records, rival = doubts(measure), "one, trained as long"
    ranks = partial(gains, records, "shifted")
    [one] = stated("and that of one network's entropy by at least #")
    own, gap, worse = stated("by less than # on turned and glued digits; upright, the two differ by less "
                             "than #. It detects glued digits worse by less than #.")
    assert_claim("Dirichlet", ranks("student: Dirichlet"), above=0)
    assert_each(ranks("student: heads"), above=0)
    assert_each(ranks("one network", "shifted, of entropy"), above=one)
    assert_each(ranks(RECIPE, "shifted, of entropy"), above=0, below=own)
    assert_each(np.abs(gains(records, "upright", RECIPE, "upright, of entropy")), below=gap)
    assert_each(gains(records, "AUROC, glued", RECIPE, "AUROC, glued, of entropy"), above=0, below=worse)
    longer, times, behind = stated(
        "The student's NLL exceeds the rival's by at most #; turned, the rival leads (table). The rival "
        "ranks a digit above noise, which only the student met in training, at least # times as often. Its "
        "entropy, and that of a network twice as wide, follows at least # worse on average.")
    assert_each(gains(records, "NLL", rival), below=longer)
    noise = [[1 - record[row]["AUROC, noise"] for row in (rival, RECIPE)] for record in records]
    assert_each([theirs / ours for theirs, ours in noise], above=times)
    for row in (rival, "one, twice as wide"):
        assert_claim(row, ranks(row, "shifted, of entropy"), above=behind)


def test_answer_uncertainty_sets(measure):
    records = [record[RECIPE] for record in doubts(measure)]
    missed, turned, classes = (np.array([record[column] for record in records])
                               for column in ("missed", "missed, turned", "size"))
    check_stated("They hold the true class of # ± # % of upright digits, with # ± # classes each",
                 100 - 100 * missed, classes)
    assert_each(turned / missed, above=stated("of turned ones they miss at least # times as many")[0])


def test_share_is_knowledge_over_total_where_its_loss_is_least():
    z = torch.tensor([[0.0] * 10 + [math.log(0.2 / 0.6)]], requires_grad=True)
    share_loss(z, torch.tensor([[0.1] * 10 + [0.2, 0.6]])).backward()  # knowledge 0.2, data 0.6
    assert z.grad.abs().max() < 1e-6


def test_laplace_samples_have_the_covariance_of_the_dense_formula(monkeypatch):
    monkeypatch.setitem(globals(), "SAMPLES", 100_000)
    torch.manual_seed(0)
    shapes = ((196, 2), (1, 2), (2, 2), (1, 2), (2, 3), (1, 3))
    net, x = [torch.randn(1, *shape) / shape[0] ** 0.5 for shape in shapes], torch.rand(50, 196)
    h, p = last_inputs(net, x)[0], run_stack(net, x)[0].softmax(-1)
    a, b = h.T @ h / 50, (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    wanted = (1000 * torch.kron(a, b) + PRIOR * torch.eye(9)).inverse()
    found = torch.cov(laplace(net, x, images=1000)[0].flatten(1).T)
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_dirichlet_loss_is_the_divergence_and_a_constant():
    z, p = torch.randn(2, 10).double(), torch.rand(10).double().softmax(-1)
    target = F.pad(p, (0, 1), value=9 / 2 / 7)  # a spread that makes the precision 7
    alpha, beta = (torch.distributions.Dirichlet(each + 1) for each in (z.exp(), (7 * p).expand(2, 10)))
    losses = torch.stack([dirichlet_loss(each, target) for each in z])
    assert_close(losses.diff(), torch.distributions.kl_divergence(alpha, beta).diff() / 7)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    log_p = torch.tensor([[0.8, 0.2]] * 10).log()
    assert calibration_error(log_p, torch.tensor([0] * 6 + [1] * 4)) == pytest.approx(0.2)


# ---- Other 3: are generative models more robust? -------------------------------------------------
#
# A classifier is a function from images (n, 784) to a score for each class (n, 10); the highest wins.

HIDDEN, CODE = 100, 12  # units of a masked autoencoder, numbers in an autoencoder's code
PICKED, PROVEN, ATTACKED = 2000, 500, 150  # test images of each seed; how many of them for what takes long
RADIUS = 1.5  # L2, as in Schott et al. 2019
FLIPS = 8  # pixels that move across the threshold of ½ within an L2 of (8 / 4) ** 0.5 < RADIUS
MADE, RATIO, BINARY = "MADE: density", "MADE: ratio to texture", "nearest neighbour, binary"


def by_class(images, labels):
    return [images[labels == digit] for digit in range(10)]


def binary(images):
    return (images > 0.5).float()


def fit_classes(net, error, images, labels, steps, rate):
    """Ten networks, one a class, trained side by side; they start at the mean image of their class."""
    parts = by_class(images, labels)
    net[-1] = torch.stack([part.mean(0) for part in parts]).clamp(1e-3, 1 - 1e-3).logit()[:, None]

    def loss(net):
        x = torch.stack([part[torch.randint(len(part), (50,))] for part in parts])
        return error(net, x) / 500
    return minimise(loss, net, steps, rate)


def fit_made(images, labels, steps=400):
    """A masked autoencoder (Germain et al. 2015) for each class: predicts pixels from those before."""
    pixel, place = torch.arange(784), torch.linspace(1, 783, HIDDEN).round()
    into, out_of = (pixel[:, None] < place).float(), (place[:, None] <= pixel).float()
    net = make_stack((784, HIDDEN, 784), 10)
    net[2] *= 0.1

    def masked(net):
        return [net[0] * into, net[1], net[2] * out_of, net[3]]

    def error(net, x):
        return F.binary_cross_entropy_with_logits(run_stack(masked(net), x), x, reduction="sum")
    return masked(fit_classes(net, error, images, labels, steps, 1e-2))


def made_score(net):
    """log p(x | y) of binary images, in nats; for greys the cross-entropy that extends it."""
    def score(x):
        logits = run_stack(net, x)
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(2).T
    return score


@torch.no_grad()
def sample_made(net, count):
    """`count` images of each class, pixel by pixel: (10, count, 784)."""
    hidden, images = net[1].repeat(1, count, 1), torch.empty(10, count, 784)
    for i in range(784):
        logit = (F.relu(hidden) * net[2][:, None, :, i]).sum(2) + net[3][:, :, i]
        images[:, :, i] = torch.bernoulli(logit.sigmoid())
        hidden += images[:, :, i, None] * net[0][:, i, None]
    return images


def decode(net, code):
    return run_stack(net[4:], code).sigmoid()


def fit_autoencoders(images, labels, steps=400):
    """784-64-12-64-784 for each class; the first four tensors encode."""
    net = make_stack((784, 64, CODE), 10) + make_stack((CODE, 64, 784), 10)
    error = lambda net, x: (decode(net, run_stack(net[:4], x)) - x).square().sum()
    return fit_classes(net, error, images, labels, steps, 3e-3)


def autoencoder_score(net, search=0):
    """Minus the distance to each class's reconstruction, after `search` steps of Adam on its code."""
    def score(x):
        code = run_stack(net[:4], x)
        if search:  # the slope in x is then that for a fixed code, as at the best code (envelope theorem)
            error = lambda codes, target=x.detach(): (decode(net, codes[0]) - target).square().sum()
            code, = minimise(error, [code], search, 0.1)
        return -(decode(net, code) - x).norm(dim=2).T
    return score


def neighbour_score(images, labels):
    """Minus the distance to the nearest training image of each class."""
    parts = by_class(images, labels)

    def score(x):
        near = [part[(part.square().sum(1) - 2 * x.detach() @ part.T).argmin(1)] for part in parts]
        return -(torch.stack(near) - x).norm(dim=2).T
    return score


def neighbour_radius(images, labels, x, truth):
    """L2 distance (n,) to the nearest plane halfway between own nearest image and one of another class."""
    mine, away = labels == truth[:, None], torch.cdist(x, images)
    own, nearest = away.masked_fill(~mine, torch.inf).min(1)
    planes = (away.square() - own[:, None].square()) / (2 * torch.cdist(images[nearest], images))
    return planes.masked_fill(mine, torch.inf).amin(1)


def fit_mlp(images, labels, steps=600, radius=0.0):
    """The score of an MLP; with a `radius`, of one trained on attacked images (Madry et al. 2018)."""
    def loss(net):
        index = torch.randint(len(images), (200,))
        x, y = images[index], labels[index]
        error = lambda x: F.cross_entropy(run_stack(net, x)[0], y, reduction="none")
        return error(climb(error, x, radius, 3) if radius else x).mean()
    net = minimise(loss, make_stack((784, 256, 256, 10), 1), steps, 2e-3)
    return lambda x: run_stack(net, x)[0]


def context(images):
    """For each pixel of binary images, the ten nearest of the pixels before it, as a number below 1024."""
    kernel = torch.zeros(15)  # three rows of five, the pixel itself in the middle of the last
    kernel[[1, 2, 3, 5, 6, 7, 8, 9, 10, 11]] = 2.0 ** torch.arange(10)
    framed = F.pad(images.view(-1, 1, 28, 28), (2, 2, 2, 0))
    return F.conv2d(framed, kernel.view(1, 1, 3, 5)).flatten(1).round().long()


def count_contexts(images):
    """How often a pixel is 0 and 1 in each context: (1024, 2)."""
    return (2 * context(images) + images.long()).flatten().bincount(minlength=2048).view(1024, 2)


def texture_score(counts, x):
    """log p (n,) of binary images, in nats, if a pixel depends on its context alone."""
    log_p = ((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)).log()
    return log_p[context(x), x.long()].sum(1)


def margin(score, labels):
    """How far the best wrong class is ahead of the true one: unlike cross-entropy, it never saturates."""
    true = F.one_hot(labels, 10).bool()

    def lead(x):
        scores = score(x)
        return scores.masked_fill(true, -torch.inf).amax(1) - scores[true]
    return lead


def climb(objective, x, radius, steps=40):
    """Projected gradient ascent within L2 `radius` of x, from a random start: the highest `objective` met."""
    def within(move):
        share = (radius / move.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        return (x + share * move).clamp(0, 1)

    images = within(radius * torch.rand(len(x), 1) * F.normalize(torch.randn_like(x)))
    best, found = torch.full((len(x),), -torch.inf), images
    for step in range(steps + 1):
        value = objective(images.requires_grad_())
        better = value.detach() > best
        best = torch.where(better, value.detach(), best)
        found = torch.where(better[:, None], images.detach(), found)
        if step < steps:
            slope, = torch.autograd.grad(value.sum(), images)
            images = within(images.detach() + 2.5 / steps * radius * F.normalize(slope) - x)
    return found


def flip(objective, x):
    """Binary images with the pixel flipped where, by its slope, the objective rises most."""
    x = x.detach().requires_grad_()
    slope, = torch.autograd.grad(objective(x).sum(), x)
    pixel = (slope * (1 - 2 * x)).argmax(1)
    return (x.detach() - F.one_hot(pixel, 784)).abs()


@torch.no_grad()
def right(score, x, labels):
    return torch.cat([score(part).argmax(1) for part in x.split(100)]) == labels


def percent(which):
    return 100 * which.float().mean().item()


def attack_all(scores, x, labels):
    """% right of each classifier, plain and under the attacks on it and on the others of `scores`."""
    some, truth = x[:ATTACKED], labels[:ATTACKED]
    inputs = [some, *(climb(margin(score, truth), some, RADIUS) for score in scores.values())]
    return {name: {"right, %": percent(right(score, x, labels)),
                   "attacked ≤": percent(torch.stack([right(score, x, truth) for x in inputs]).all(0))}
            for name, score in scores.items()}


def attack_binary(score, x, labels):
    """The same of a classifier of binary images, under up to FLIPS flips."""
    some, truth = x[:ATTACKED], labels[:ATTACKED]
    kept = right(score, some, truth)
    for _ in range(FLIPS):
        some = flip(margin(score, truth), some)
        kept &= right(score, some, truth)
    return {"right, %": percent(right(score, x, labels)), "attacked ≤": percent(kept)}


def pick(seed):
    """The training images, and test images of the seed's own."""
    torch.manual_seed(seed)
    images, labels = splits().test
    index = torch.randperm(len(images))[:PICKED]
    return *splits().train, images[index], labels[index]


def measure_attacks(seed, few=30):
    images, labels, x, truth = pick(seed)
    net = fit_autoencoders(images, labels)
    plain, searched = autoencoder_score(net), autoencoder_score(net, 20)
    far = climb(margin(searched, truth[:few]), x[:few], 4)
    mlp, adversarial = fit_mlp(images, labels), fit_mlp(images, labels, steps=300, radius=RADIUS)
    inked, shown = binary(images), binary(x)
    of_binary = {MADE: made_score(fit_made(inked, labels)), BINARY: neighbour_score(inked, labels)}
    table = {name: attack_binary(score, shown, truth) for name, score in of_binary.items()}
    table |= attack_all({"nearest neighbour": neighbour_score(images, labels)}, x, truth)
    table |= attack_all({"autoencoders": plain, "autoencoders, searched": searched}, x, truth)
    table |= attack_all({"MLP": mlp, "MLP, adversarially trained": adversarial}, x, truth)
    proven = neighbour_radius(images, labels, x[:PROVEN], truth[:PROVEN]) > RADIUS
    table["nearest neighbour"]["proven ≥"] = percent(proven)
    return {"table": table, "proven of attacked": percent(proven[:ATTACKED]),
            "L2 4": percent(right(searched, far, truth[:few]))}


def log_mean(log_p):
    """log of the mean over the classes: log p(x), if all are as likely."""
    return log_p.logsumexp(1) - math.log(log_p.shape[1])


@torch.no_grad()
def measure_novelty(seed):
    """AUROC of each score, for each class left out of the model and for shuffled pixels; costs in bits."""
    images, labels, x, truth = pick(seed)
    made, distances = fit_made(binary(images), labels), -neighbour_score(images, labels)(x)
    density = made_score(made)
    counts = torch.stack([count_contexts(part) for part in by_class(binary(images), labels)])
    parts = [(images[labels != digit], labels[labels != digit]) for digit in range(11)]
    mlps = [fit_mlp(*part) for part in parts]

    def doubts(x, left_out=10):
        """How novel each of the images x is to models without a class, by each score."""
        known = torch.arange(10) != left_out
        cost, confidence = -log_mean(density(binary(x))[:, known]), mlps[left_out](x)[:, known].double()
        return {MADE: cost, RATIO: cost + texture_score(counts[known].sum(0), binary(x)),
                "MLP": -confidence.softmax(1).amax(1)}

    aurocs, bits = {}, {}
    for digit, samples in enumerate(sample_made(made, 200)):
        known, new, found = torch.arange(10) != digit, truth == digit, doubts(x, digit)
        found["nearest neighbour"] = distances[:, known].amin(1)
        aurocs[digit] = {name: auroc(value[new], value[~new]) for name, value in found.items()}
        costs = {"entropy": -density(samples)[:, digit], "sum": -log_mean(density(samples)[:, known]),
                 "real": found[MADE][new], "known": found[MADE][~new]}
        bits[digit] = {name: cost.mean().item() / math.log(2) for name, cost in costs.items()}
    rest = [aurocs[digit] for digit in range(10) if digit != 1]  # 1 is the simplest
    aurocs["others"] = {name: np.mean([each[name] for each in rest]) for name in rest[0]}
    usual, shuffled = doubts(x), doubts(x.gather(1, torch.rand_like(x).argsort(1)))
    aurocs["shuffled"] = {name: auroc(shuffled[name], usual[name]) for name in usual}
    return {"AUROC": aurocs, "bits": bits}


def measure_shortcuts(seed, told=0.95):
    """% right where marks of 1 and of 14 pixels, which told the class in 95 % of the training images, lie."""
    images, labels, x, truth = pick(seed)

    def other(labels):
        return (labels + torch.randint(1, 10, labels.shape)) % 10

    def mark(x, digit, size):
        return binary(torch.cat([F.one_hot(digit, 10).repeat_interleave(size, 1), x[:, 10 * size:]], dim=1))

    lie, said = other(truth), torch.where(torch.rand(len(labels)) < told, labels, other(labels))
    found = {}
    for size in (1, 14):
        marked, lying = mark(images, said, size), mark(x, lie, size)
        scores = {"MADE": made_score(fit_made(marked, labels)), "MLP": fit_mlp(marked, labels)}
        found |= {(name, size): percent(right(score, lying, truth)) for name, score in scores.items()}
    return found


PARTS = {"shortcuts": measure_shortcuts, "attacks": measure_attacks, "novelty": measure_novelty}


def robustness(part, seed):
    return PARTS[part](seed)


def records_of(measure, part):
    """A record for each seed; all parts of all seeds are measured in one go."""
    jobs = [(name, seed) for name in PARTS for seed in SEEDS]
    return [record for job, record in zip(jobs, measure(robustness, jobs)) if job[0] == part]


def test_answer_robustness_models(measure):
    novelty, records = records_of(measure, "novelty"), records_of(measure, "attacks")
    table = [dict(record["table"]) for record in records]
    for row, record in zip(table, novelty):
        for name, first in record["AUROC"][1].items():
            rest = record["AUROC"]["others"][name]
            row[name] = row.get(name, {}) | {"AUROC, 1s": first, "AUROC, others": rest}
    check_table("robustness_models", table)
    attacked = lambda name: np.array([row[name]["attacked ≤"] for row in table])
    proven = np.array([row["nearest neighbour"]["proven ≥"] for row in table])
    searched = attacked("autoencoders, searched")
    assert all(record["proven of attacked"] <= record["table"]["nearest neighbour"]["attacked ≤"]
               and record["L2 4"] == 0 for record in records)
    assert_claim("little", attacked(MADE), below=15)
    for weaker in MADE, "MLP":
        assert_each(proven - attacked(weaker), above=0)
    check_stated("keep # points more than MADE (± #)", attacked(BINARY) - attacked(MADE))
    assert_each(searched - attacked("autoencoders"), above=0)
    check_stated("They keep # points more (± #)", searched - attacked("autoencoders"))
    [less] = stated("gives an MLP about as much, more in the table, with every seed at most # points less")
    assert_each(attacked("MLP, adversarially trained") - searched, above=-less)


def test_answer_robustness_novelty(measure):
    records = records_of(measure, "novelty")
    of = lambda name, kind: np.array([record["AUROC"][kind][name] for record in records])
    bits = lambda digit, what: np.array([record["bits"][digit][what] for record in records])
    assert_claim("1s", of(MADE, 1), below=0.55)
    assert_claim("1s, softmax", of("MLP", 1) - of(MADE, 1), above=0.3)
    [gap] = stated("mean AUROCs differ by less than #. ")
    assert_claim("others, softmax", of(MADE, "others") - of("MLP", "others"), above=-gap, below=gap)
    assert_claim("ratio, 1s", of(RATIO, 1) - of(MADE, 1), above=0.2)
    assert_claim("ratio, shuffled", of(RATIO, "shuffled") - of(MADE, "shuffled"), below=-0.2)
    check_stated("shuffled pixels (AUROC # to #)", of(MADE, "shuffled"), of(RATIO, "shuffled"), within=0.08)
    divergence = lambda digit: bits(digit, "sum") - bits(digit, "entropy")
    for digit, sentence in (1, "1s: # bits of entropy + # of divergence = #"), (5, "5s: # + # = #"):
        check_stated(sentence, bits(digit, "entropy"), divergence(digit), bits(digit, "sum"), within=12)
    check_stated("yet take fewer bits than known digits (#)", bits(1, "known"), within=8)
    assert_claim("1s cost less than known digits", bits(1, "sum") - bits(1, "known"), below=0)
    assert_claim("as foreign", divergence(1) - divergence(5), above=-20, below=30)
    off = np.mean([abs(bits(digit, "sum") / bits(digit, "real") - 1) for digit in range(10)], axis=0)
    assert_claim("samples predict the cost of digits", off, below=stated("# % or less on average")[0] / 100)


def test_answer_robustness_shortcuts(measure):
    of = lambda *key: np.array([record[key] for record in records_of(measure, "shortcuts")])
    assert_claim("one pixel", of("MADE", 1) - of("MLP", 1), above=0)
    assert_claim("fourteen", of("MLP", 14) - of("MADE", 14), above=0)
    check_stated("One pixel leaves MADE # % and the MLP # % right", of("MADE", 1), of("MLP", 1), within=6)
    check_stated("14 pixels a class leave them # % and # %", of("MADE", 14), of("MLP", 14), within=8)


def test_made_is_a_distribution_and_its_samples_follow_it():
    torch.manual_seed(0)
    x, y = torch.rand(200, 784).round(), torch.arange(200) % 10
    net = [part + 0.1 * torch.randn_like(part) * (part != 0) for part in fit_made(x, y, 2)]
    for i in (0, 300, 783):  # no output looks at its own pixel or a later one
        other = torch.cat([x[:1, :i], 1 - x[:1, i:]], dim=1)
        assert_close(run_stack(net, x[:1])[:, :, :i + 1], run_stack(net, other)[:, :, :i + 1])
    by_hand = torch.distributions.Bernoulli(logits=run_stack(net, x[:1])[4, 0]).log_prob(x[0]).sum()
    assert made_score(net)(x[:1])[0, 4].item() == pytest.approx(by_hand.item(), rel=1e-5)
    samples = sample_made(net, 2000)
    rate = run_stack(net, samples).sigmoid().mean(1)  # of each pixel, over what came before it
    assert (samples.mean(1) - rate).abs().max() < 0.06


def test_proven_radii_end_at_the_plane_between_two_images():
    images, labels = torch.tensor([[0.0, 0], [2, 0], [-1, 9]]), torch.tensor([0, 1, 0])
    x = torch.tensor([[0.4, 0], [0.4, 3], [1.5, 0]])
    radius = neighbour_radius(images, labels, x, torch.zeros(3, dtype=torch.long))
    assert radius.tolist() == pytest.approx([0.6, 0.6, -0.5], abs=1e-5)


def test_the_attack_reaches_what_a_linear_classifier_allows_and_no_more():
    torch.manual_seed(0)
    weights, x = torch.randn(784, 10), torch.full((20, 784), 0.5) + 0.01 * torch.randn(20, 784)
    score = lambda x: x @ weights
    labels = score(x).argmax(1)
    gaps = (score(x).amax(1, keepdim=True) - score(x)) / (weights.T[labels][:, None] - weights.T).norm(dim=2)
    distance = gaps.masked_fill(F.one_hot(labels, 10).bool(), torch.inf).amin(1, keepdim=True)
    for share, expected in (0.98, True), (1.1, False):
        found = climb(margin(score, labels), x, share * distance)
        assert (right(score, found, labels) == expected).float().mean() > 0.9
        assert ((found - x).norm(dim=1) <= 1.0001 * share * distance[:, 0]).all()
    dark, slope = x.round(), weights[:, 0]
    every = torch.stack([(dark - pixel).abs() @ slope for pixel in torch.eye(784)]).amax(0)
    assert_close(flip(lambda x: x @ slope, dark) @ slope, every)  # the best of all single flips


def test_contexts_and_auroc_have_their_known_values():
    x = torch.zeros(1, 784)
    x[0, 28 * 5 + 5] = 1  # seen from the right as bit 9, from below as bit 5, from two rows below as bit 1
    seen = context(x).view(28, 28)
    assert (seen[5, 6], seen[6, 5], seen[7, 5], seen[5, 5], seen[4, 5]) == (512, 32, 2, 0, 0)
    assert count_contexts(x).sum() == 784 and count_contexts(x)[0, 1] == 1
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


# ---- The document --------------------------------------------------------------------------------

TABLES = re.findall(r"<!-- (\w+) -->", ANSWERS.read_text(encoding="utf-8"))


def test_every_table_has_its_measurement():
    checked = re.findall(r'check_table\(\s*"(\w+)"', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(TABLES) == sorted(checked)


@pytest.mark.parametrize("name", TABLES)
def test_a_falsified_figure_is_caught(name):
    written = written_table(name)
    cells = {key: figure(cell) for key, cell in written.items() if cell and key[0] != TOLERANCE}
    measured = {row: {} for row, _ in cells}
    for (row, column), value in cells.items():
        measured[row][column] = value
    assert not differences(written, measured)
    for (row, column), value in cells.items():
        measured[row][column] += 1.1 * allowance(value, written[TOLERANCE, column]) + 1e-9
        assert len(differences(written, measured)) == 1, (row, column)
        measured[row][column] = value
    measured.pop(row)
    assert differences(written, measured)


def test_every_reference_is_cited_in_order():
    for answer in ANSWERS.read_text(encoding="utf-8").split("\n## ")[1:]:
        body, references = answer.split("\n### References\n")
        groups = re.findall(r"\[([1-9]\d*(?:, \d+)*)\]", " ".join(body.split()))
        cited = list(dict.fromkeys(int(number) for group in groups for number in group.split(", ")))
        numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. ", references)]
        assert cited == numbers == list(range(1, len(numbers) + 1)), answer.splitlines()[0]


@pytest.mark.parametrize("document", ["README.md", "ANSWERS.md"])
def test_every_picture_is_there(document):
    for picture in re.findall(r'src="(.*?)"', (HERE / document).read_text(encoding="utf-8")):
        assert (HERE / picture).is_file(), picture

"""Tests of autoencoder.py: `pytest` runs them all and needs no network; MNIST is used if the data folder has it.

    python test_autoencoder.py              measures all tables in README.md and ANSWERS.md afresh and writes them there
    python test_autoencoder.py answers      only those in ANSWERS.md; or name one: test_answer_sensible, densities, ...
"""

import atexit
import base64
import contextlib
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import autoencoder as ae

HERE = Path(__file__).resolve().parent
MNIST_FOLDER = HERE / "data"
needs_mnist = pytest.mark.skipif(
    not all((MNIST_FOLDER / "MNIST" / "raw" / name).is_file() for name in ae.MNIST_FILES),
    reason="MNIST is not in the folder data: `python autoencoder.py` downloads it")


@pytest.fixture(scope="session")
def digits():
    """A small data set: 4,000 and 500 drawn digits."""
    return ae.Data(*ae.draw_digits(4000, 1), *ae.draw_digits(500, 2), "drawn digits, not MNIST")


@pytest.fixture(scope="session")
def quick(digits):
    """An untrained small model's maker, and loaders of the small data set."""
    return partial(ae.AutoEncoder, 784, 20, width=64, depth=2), digits


# ---- The contract ----------------------------------------------------------------------------------------------------

def published_checks(model):
    """The checks of the task, written anew from its description, apart from those in the script."""
    x = torch.randn(1, 784)
    h = model.encode(x)
    recon_x = model.decode(h)
    assert h.dim() == 2 and h.size(1) == 20 and recon_x.dim() == 2 and recon_x.size(1) == 784
    with_parameters = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(with_parameters) <= 6
    assert all(size <= 800 for p in model.parameters() for size in p.shape)
    for name in with_parameters:
        assert type(dict(model.named_children())[name]) is nn.Linear


@pytest.mark.parametrize("settings", [
    {}, {"width": 800}, {"width": 1}, {"depth": 1}, {"depth": 2}, {"feedback": 0}, {"feedback": 3}, {"dropout": 0.5},
    *({"loss": loss} for loss in ae.LOSSES), *({"regulariser": r, "strength": 1e-4} for r in ae.REGULARISERS)])
def test_every_setting_keeps_the_contract(settings):
    torch.manual_seed(0)
    model = ae.AutoEncoder(inp_size=784, hid_size=20, **settings)
    published_checks(model)
    ae.check_limits(model)
    x = torch.rand(7, 784)
    assert model.encode(x).shape == (7, 20) and model(x).shape == (7, 784)
    loss = model.loss_function(model(x), x)
    assert loss.ndim == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sizes_are_free_and_positional():
    model = ae.AutoEncoder(np.int64(12), 3)
    assert model.encode(torch.rand(5, 12)).shape == (5, 3) and model.decode(torch.rand(5, 3)).shape == (5, 12)


@pytest.mark.parametrize("settings, named", [
    ({"loss": "mse"}, "euclidean, squared, absolute, cross-entropy"), ({"regulariser": None}, "l1, l2, code"),
    ({"strength": -1.0}, "0 or more"), ({"strength": float("nan")}, "finite"), ({"depth": 0}, "from 1 to 3"),
    ({"depth": 4}, "from 1 to 3"), ({"depth": 2.0}, "whole number"), ({"width": 801}, "to 800"), ({"width": 0}, "from"),
    ({"dropout": 1.0}, "below 1"), ({"strength": "1"}, "finite"), ({"loss": ["euclidean"]}, "euclidean"),
    ({"dropout": -0.1}, "from 0"), ({"feedback": -1}, "0 or more"),
    ({"hid_size": 0}, "1 or more")])
def test_bad_settings_are_refused_with_what_is_allowed(settings, named):
    with pytest.raises(ValueError, match=next(iter(settings))) as error:
        ae.AutoEncoder(**{"inp_size": 784, "hid_size": 20} | settings)
    assert named in str(error.value)


def test_images_that_were_not_flattened_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"flatten"):
        ae.AutoEncoder(784, 20).encode(torch.rand(5, 1, 28, 28))


class Breaks(ae.AutoEncoder):
    """A model that keeps every limit but one, which a subclass breaks."""

    def __init__(self, **settings):
        super().__init__(inp_size=784, hid_size=20, **settings)


class DeepCode(Breaks):
    def encode(self, x):
        return super().encode(x).unsqueeze(1)

    def decode(self, h):
        return super().decode(h.flatten(1))


class WideCode(Breaks):
    def __init__(self):
        ae.AutoEncoder.__init__(self, 784, 21)


class DeepOutput(Breaks):
    def decode(self, h):
        return super().decode(h).unsqueeze(1) if h.requires_grad is False else super().decode(h)

    def encode(self, x):
        return x[:, :20]


class ShortOutput(Breaks):
    def decode(self, h):
        return super().decode(h)[:, :783]

    def encode(self, x):
        return x[:, :20]


class Seventh(Breaks):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(20, 20)


class Wide(Breaks):
    def __init__(self):
        super().__init__(depth=1)
        self.more = nn.Linear(20, 801)


class Nested(Breaks):
    def __init__(self):
        super().__init__(depth=1)
        self.more = nn.Sequential(nn.Linear(20, 20))


class NotLinear(Breaks):
    def __init__(self):
        super().__init__(depth=1)
        self.more = nn.Conv2d(1, 1, 3)


class Bare(Breaks):
    def __init__(self):
        super().__init__(depth=1)
        self.more = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("broken, cause", [
    (DeepCode, "hidden representation has 3 dimensions"), (WideCode, "hidden representation has size 21"),
    (DeepOutput, "reconstruction has 3 dimensions"), (ShortOutput, "reconstruction has size 783"),
    (Seventh, "7 layers"), (Wide, "801"), (Nested, "more.0"), (NotLinear, "not those of an nn.Linear"),
    (Bare, "the model itself")])
def test_a_model_that_breaks_a_limit_is_refused(broken, cause):
    with pytest.raises(AssertionError, match=cause):
        ae.check_limits(broken())


# ---- The objective ---------------------------------------------------------------------------------------------------

def test_default_loss_is_the_objective_by_hand():
    model = ae.AutoEncoder(2, 1, depth=1, strength=0.5)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), ([[3.0, -1.0]], [0.5], [[2.0], [-2.0]], [0.0, -1.5])):
            parameter.copy_(torch.tensor(value))
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    recon_x = torch.tensor([[4.0, 5.0], [0.0, 0.0], [2.0, -12.0]], requires_grad=True)
    loss = model.loss_function(recon_x, x)
    assert loss.item() == pytest.approx((5 + 0 + 12) + 0.5 * (3 + 1 + 0.5 + 2 + 2 + 0 + 1.5))
    loss.backward()
    # a unit vector along each residual, and nothing (not NaN) where the residual is zero
    assert recon_x.grad.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, -1]]
    assert [p.grad.tolist() for p in model.parameters()] == [[[0.5, -0.5]], [0.5], [[0.5], [-0.5]], [0, -0.5]]


def test_losses_and_regularisers_match_numpy():
    torch.manual_seed(0)
    x, recon_x = torch.rand(6, 30, dtype=torch.float64), torch.rand(6, 30, dtype=torch.float64)
    a, b = x.numpy(), recon_x.numpy()
    expected = {"euclidean": np.sqrt(((a - b) ** 2).sum(1)).sum(), "squared": ((a - b) ** 2).sum(),
                "absolute": np.abs(a - b).sum(), "cross-entropy": -(a * np.log(b) + (1 - a) * np.log(1 - b)).sum()}
    assert set(expected) == set(ae.LOSSES)
    for loss, value in expected.items():
        assert ae.AutoEncoder(30, 4, loss=loss).double().loss_function(recon_x, x).item() == pytest.approx(value)
    for regulariser in ae.REGULARISERS:
        model = ae.AutoEncoder(30, 4, width=8, regulariser=regulariser, strength=0.01).double()
        theta = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
        penalty = {"l1": np.abs(theta).sum(), "l2": (theta ** 2).sum(),
                   "code": (model.encode(x).detach().numpy() ** 2).sum() / 2}[regulariser]
        value = model.loss_function(recon_x, x).item()
        assert value == pytest.approx(expected["euclidean"] + 0.01 * penalty)


@pytest.mark.parametrize("loss", ae.LOSSES)
def test_gradient_matches_finite_differences(loss):
    torch.manual_seed(0)
    model = ae.AutoEncoder(10, 3, width=6, loss=loss, strength=0.01, feedback=2).double()
    x = torch.rand(4, 10, dtype=torch.float64)
    model.loss_function(model(x), x).backward()
    for parameter in model.parameters():
        flat, index = parameter.data.view(-1), parameter.numel() // 2
        keep, values = flat[index].item(), []
        for step in (1e-6, -1e-6):
            flat[index] = keep + step
            values.append(model.loss_function(model(x), x).item())
        flat[index] = keep
        assert parameter.grad.view(-1)[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_batches_add_up_and_the_penalty_comes_with_each():
    torch.manual_seed(0)
    model, x = ae.AutoEncoder(30, 4, strength=0.1), torch.rand(10, 30)
    penalty = 0.1 * sum(p.abs().sum().item() for p in model.parameters())
    value = lambda x: model.loss_function(model(x), x).item()
    assert value(x[:3]) + value(x[3:]) == pytest.approx(value(x) + penalty, rel=1e-5)


def test_extreme_reconstructions_keep_cross_entropy_finite():
    model = ae.AutoEncoder(4, 2, loss="cross-entropy")
    recon_x = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    loss = model.loss_function(recon_x, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    loss.backward()
    assert loss.isfinite() and recon_x.grad.isfinite().all()


# ---- encode, decode, forward -----------------------------------------------------------------------------------------

def test_forward_decodes_what_it_encodes_one_image_at_a_time():
    torch.manual_seed(0)
    model, x = ae.AutoEncoder(784, 20).eval(), torch.rand(9, 784)
    whole = model(x)
    assert torch.equal(whole, model.decode(model.encode(x)))
    assert torch.allclose(whole, torch.cat([model(row) for row in x.split(1)]), atol=1e-5)
    assert (0 <= whole).all() and (whole <= 1).all()


def test_feedback_moves_the_code_by_what_came_back_different():
    torch.manual_seed(0)
    model, x = ae.AutoEncoder(30, 4, width=16).eval(), torch.rand(5, 30)
    once = ae.AutoEncoder(30, 4, width=16, feedback=0).eval()
    once.load_state_dict(model.state_dict())
    e = once.encode
    h = e(x)
    h = h + e(x) - e(model.decode(h))
    assert torch.allclose(model.encode(x), h, atol=1e-6)
    model.feedback = 2
    assert torch.allclose(model.encode(x), h + e(x) - e(model.decode(h)), atol=1e-6)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = ae.AutoEncoder(784, 20, dropout=0.5), torch.rand(3, 784)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("make_optimizer", [lambda p: torch.optim.Adam(p, lr=1e-3), 
                                            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)])
def test_learns_in_a_foreign_training_loop(digits, make_optimizer):
    torch.manual_seed(0)
    model = ae.AutoEncoder(784, 20)
    optimizer = make_optimizer(model.parameters())
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=50, shuffle=True)
    for _ in range(5):
        for images, _ in loader:
            images = images.view(images.size(0), -1)
            optimizer.zero_grad()
            loss = model.loss_function(model(images), images)
            loss.backward()
            optimizer.step()
    x = digits.test_images.flatten(1)
    with torch.no_grad():
        error = (model(x) - x).square().mean().item()
    assert error < 0.8 * (x - digits.train_images.flatten(1).mean(0)).square().mean().item()


# ---- train -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, drop_last", [(1, False), (37, False), (37, True), (500, False)])
def test_train_takes_any_loader(quick, tmp_path, capsys, batch_size, drop_last):
    make, digits = quick
    images, labels = digits.train_images[:101], digits.train_labels[:101]
    if batch_size > 101 and drop_last:
        pytest.skip("no batch at all")
    loaders = [DataLoader(TensorDataset(images, labels), batch_size, shuffle=True, drop_last=drop_last),
               DataLoader(TensorDataset(digits.test_images[:11], digits.test_labels[:11]), batch_size=3)]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert ae.train(model, optimizer, *loaders, epochs=2, pics=tmp_path) is model
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(re.fullmatch(r"epoch +\d+/2  train loss [\d.]+  test loss [\d.]+  [\d.]+ s", line)
                                   for line in lines)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_train_takes_a_loader_over_a_stream(quick, tmp_path, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(digits.train_images[:1000], digits.train_labels[:1000])
    make, digits = quick
    torch.manual_seed(0)
    model = make()
    ae.train(model, torch.optim.Adam(model.parameters()), DataLoader(Stream(), 50), DataLoader(Stream(), 50), 4, tmp_path)
    losses = [float(loss) for loss in re.findall(r"test loss ([\d.]+)", capsys.readouterr().out)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_train_runs_ten_epochs_and_shows_eight_test_images_above_their_reconstructions(quick, tmp_path, monkeypatch, capsys):
    make, digits = quick
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(digits.test_images[:20], digits.test_labels[:20]), batch_size=5)
    model = make()
    ae.train(model, torch.optim.Adam(model.parameters()), loader, loader)
    assert sorted(os.listdir("pics")) == sorted(f"reconstruction_{epoch}.png" for epoch in range(1, 11))
    picture = np.asarray(Image.open("pics/reconstruction_10.png").convert("L"))
    assert picture.shape == (2 * 30 + 2, 8 * 30 + 2)
    x = digits.test_images[:8]
    with torch.no_grad():
        rows = x, model(x.flatten(1)).view(x.shape)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            shown = picture[2 + 30 * row:, 2 + 30 * column:][:28, :28]
            assert np.abs(shown / 255 - image[0].numpy()).max() < 0.01


def test_reported_losses_are_averages_per_image(quick, tmp_path, capsys):
    make, digits = quick
    model = make()
    loader = DataLoader(TensorDataset(digits.test_images[:31], digits.test_labels[:31]), batch_size=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)  # so small that every batch meets the same model
    ae.train(model, optimizer, loader, loader, epochs=1, pics=tmp_path)
    x = digits.test_images[:31].flatten(1)
    expected = torch.linalg.vector_norm(model(x) - x, dim=1).mean().item()
    train_loss, test_loss = map(float, re.findall(r"loss ([\d.]+)", capsys.readouterr().out))
    assert train_loss == pytest.approx(expected, abs=1e-4) and test_loss == pytest.approx(expected, abs=1e-4)
    loss, error = ae.evaluate(model, loader)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert error == pytest.approx((model(x) - x).square().mean().item(), rel=1e-5)


def test_the_rate_follows_one_cycle(quick, tmp_path):
    make, digits = quick
    model, rates = make(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    loader = DataLoader(TensorDataset(digits.test_images[:100], digits.test_labels[:100]), batch_size=10)
    ae.train(model, optimizer, loader, loader, epochs=10, pics=tmp_path)
    assert np.allclose(rates[:21], np.linspace(0, 0.05, 21)) and np.allclose(rates[20:], np.linspace(0.05, 0, 81)[:-1])


def test_progress_is_live_on_a_terminal_only(quick, tmp_path, monkeypatch, capsys):
    make, digits = quick
    model = make()
    loader = DataLoader(TensorDataset(digits.train_images, digits.train_labels), batch_size=5)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    ae.train(model, torch.optim.Adam(model.parameters()), loader, loader, epochs=1, pics=tmp_path)
    out = capsys.readouterr().out
    assert re.match(r"\repoch  1/1 +\d+%  train loss [\d.]+\r", out) and out.count("\n") == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_and_harms_nothing(quick, tmp_path, bad):
    make, digits = quick
    images = digits.train_images[:100].clone()
    images[60, 0, 3, 3] = bad
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(images, digits.train_labels[:100]), batch_size=10)
    with pytest.raises(FloatingPointError, match="epoch  1/10, batch 7"):
        ae.train(model, optimizer, loader, loader, pics=tmp_path)
    assert all(p.isfinite().all() for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 1e-3


def test_an_empty_loader_is_an_error_that_says_so(quick, tmp_path):
    make, digits = quick
    model = make()
    full = DataLoader(TensorDataset(digits.test_images[:10], digits.test_labels[:10]), batch_size=5)
    empty = DataLoader(TensorDataset(digits.test_images[:0], digits.test_labels[:0]), batch_size=5)
    for loaders, which in (((empty, full), "training"), ((full, empty), "test")):
        with pytest.raises(ValueError, match=f"{which} loader gives no images"):
            ae.train(model, torch.optim.Adam(model.parameters()), *loaders, pics=tmp_path)


def test_an_unwritable_picture_folder_is_refused_before_training(quick, tmp_path):
    make, digits = quick
    model = make()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="--pics"):
        ae.train(model, torch.optim.Adam(model.parameters()), [], [], pics=tmp_path / "file")


def test_same_seed_same_losses(quick, tmp_path, capsys):
    make, digits = quick
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = make(dropout=0.1)
        ae.train(model, torch.optim.Adam(model.parameters()), *ae.make_loaders(digits, seed=seed), epochs=2, pics=tmp_path)
        runs.append((re.findall(r"loss ([\d.]+)", capsys.readouterr().out), model.state_dict()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values()))


def test_pca_error_matches_a_singular_value_decomposition(digits):
    train, test = (images.flatten(1).double().numpy() for images in (digits.train_images[:1000], digits.test_images))
    mean = train.mean(0)
    directions = np.linalg.svd(train - mean, full_matrices=False)[2][:20]
    residual = (test - mean) - (test - mean) @ directions.T @ directions
    assert ae.pca_error(digits.train_images[:1000], digits.test_images, 20) == pytest.approx((residual ** 2).mean(), rel=1e-4)


# ---- test_work -------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_work(digits, tmp_path, monkeypatch):
    """test_work on the small data set."""
    monkeypatch.setattr(ae, "load_data", lambda folder, seed: digits)
    return partial(ae.test_work, pics=tmp_path / "pics", epochs=6)


def test_work_succeeds_and_names_its_data(small_work, capsys):
    small_work()
    assert capsys.readouterr().out.splitlines()[-1] == "Success!🎉 (drawn digits, not MNIST)"


def refused(work, cause, original, capsys):
    with pytest.raises(AssertionError, match=cause) as error:
        work()
    assert type(error.value.__cause__) is original
    assert "Success" not in capsys.readouterr().out


def test_work_refuses_a_model_that_cannot_be_made(small_work, monkeypatch, capsys):
    def broken(**sizes):
        raise TypeError("no such layer")
    monkeypatch.setattr(ae, "AutoEncoder", broken)
    refused(small_work, "error during model creation: no such layer", TypeError, capsys)


def test_work_refuses_a_model_that_cannot_be_trained(small_work, monkeypatch, capsys):
    monkeypatch.setattr(ae.AutoEncoder, "loss_function", lambda self, recon_x, x: [][0])
    refused(small_work, "error during training: list index out of range", IndexError, capsys)


def test_work_refuses_a_model_beyond_the_limits(small_work, monkeypatch, capsys):
    monkeypatch.setattr(ae, "AutoEncoder", lambda inp_size, hid_size: Nested())
    monkeypatch.setattr(ae, "train", lambda *_: None)
    refused(small_work, "more.0", type(None), capsys)


def test_work_refuses_a_model_that_does_not_learn(small_work, monkeypatch, capsys):
    monkeypatch.setattr(ae, "train", lambda *_: None)
    with pytest.raises(AssertionError, match="does not beat a linear code"):
        small_work()
    assert "Success" not in capsys.readouterr().out


def test_work_refuses_a_model_that_is_merely_linear(small_work, monkeypatch, capsys):
    """The best linear code itself ties with PCA: no margin is given away."""
    error = ae.pca_error
    monkeypatch.setattr(ae, "train", lambda *_: None)
    monkeypatch.setattr(ae, "evaluate", lambda *_: (0.0, measured))
    measured = error(*(ae.load_data("", 0)[i] for i in (0, 2)), 20)
    with pytest.raises(AssertionError, match="does not beat a linear code"):
        small_work()
    measured *= 0.99
    small_work()


@needs_mnist
def test_work_answers_for_what_the_readme_says_of_mnist(tmp_path, capsys):
    """A whole training, a minute: the name keeps it out of the quick part, `-k "not answer"`."""
    ae.test_work(data=MNIST_FOLDER, pics=tmp_path)
    out = capsys.readouterr().out
    error, linear = map(float, re.search(r"test images: ([\d.]+), .*: ([\d.]+)", out).groups())
    assert error <= 0.0050 and linear == pytest.approx(0.0236, abs=0.0002)
    assert out.splitlines()[-1] == "Success!🎉 (MNIST)" and len(os.listdir(tmp_path)) == 11


# ---- Data ------------------------------------------------------------------------------------------------------------

@needs_mnist
def test_mnist_is_loaded_as_it_is():
    data = ae.load_data(MNIST_FOLDER)
    assert data.name == "MNIST" and data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    expected = torchvision.transforms.ToTensor()(Image.fromarray(torchvision.datasets.MNIST(MNIST_FOLDER).data[7].numpy()))
    assert torch.equal(data.train_images[7], expected)
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train_images.min() == 0 and data.train_images.max() == 1


def test_loaders_give_each_image_once_with_its_label_in_a_new_order(digits):
    loader, _ = ae.make_loaders(digits, batch_size=30)
    first, second = (torch.cat(parts) for parts in zip(*loader)), (torch.cat(parts) for parts in zip(*loader))
    (images, labels), (_, again) = first, second
    assert isinstance(loader, DataLoader) and len(loader) == 134 and len(images) == 4000
    assert not torch.equal(labels, again)
    key = lambda images, labels: sorted(zip(images.sum((1, 2, 3)).tolist(), labels.tolist()))
    assert key(images, labels) == key(digits.train_images, digits.train_labels)


def test_drawn_digits_are_images_of_their_labels():
    start = time.perf_counter()
    images, labels = ae.draw_digits(7000, 5)
    assert time.perf_counter() - start < 5
    assert images.shape == (7000, 1, 28, 28) and images.min() == 0 and 0.9 < images.max() <= 1
    assert 0.05 < images.mean() < 0.25 and images[:, :, 0].mean() < 0.02  # dark background, dark border
    assert (labels.bincount(minlength=10) > 600).all()
    again, other = ae.draw_digits(7000, 5), ae.draw_digits(7000, 6)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1]) and not torch.equal(images, other[0])
    assert len(images.flatten(1).unique(dim=0)) == 7000
    x, y = images[:5000].flatten(1), images[5000:].flatten(1)  # the nearest of the others shows the same digit
    assert (labels[torch.cdist(y, x).argmin(1)] == labels[5000:]).float().mean() > 0.9


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A stand-in for MNIST's server: four small files, gzipped; `mirrors` is torchvision's list of places to ask."""
    (tmp_path / "served").mkdir()
    resources, hashes = [], {}
    for name, shape in zip(ae.MNIST_FILES, ((60, 28, 28), (60,), (10, 28, 28), (10,))):
        content = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
        content += np.random.default_rng(0).integers(0, 10, shape, np.uint8).tobytes()
        packed = gzip.compress(content)
        (tmp_path / "served" / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
        hashes[name] = hashlib.sha256(content).hexdigest()
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "served")) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(ae, "MNIST_FILES", hashes)
        monkeypatch.setattr(ae.MNIST, "resources", resources)
        monkeypatch.setattr(ae.MNIST, "mirrors", [f"http://127.0.0.1:{http.server_port}/"])
        draw = ae.draw_digits
        monkeypatch.setattr(ae, "draw_digits", lambda count, seed: draw(count // 1000, seed))
        yield tmp_path / "served"
        http.shutdown()


def test_absent_data_is_downloaded_once(server, tmp_path, monkeypatch):
    first = ae.load_data(tmp_path / "new")
    assert first.name == "MNIST" and first.train_images.shape == (60, 1, 28, 28)
    monkeypatch.setattr(ae.MNIST, "mirrors", [])
    assert torch.equal(ae.load_data(tmp_path / "new").train_images, first.train_images)


def test_a_file_that_is_missing_is_fetched(server, tmp_path):
    ae.load_data(tmp_path / "new")
    raw = tmp_path / "new" / "MNIST" / "raw"
    for name in os.listdir(raw):
        if name.startswith("t10k-labels"):
            (raw / name).unlink()
    assert ae.load_data(tmp_path / "new").name == "MNIST"


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content + b"\0",
                                    lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:]])
@pytest.mark.parametrize("name", ae.MNIST_FILES)
def test_a_damaged_file_is_named_and_never_used(server, tmp_path, name, damage):
    ae.load_data(tmp_path / "new")
    path = tmp_path / "new" / "MNIST" / "raw" / name
    content = path.read_bytes()
    changed = damage(content) if len(content) > 500 else damage(content + bytes(600))
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"{name} is damaged.*[Dd]elete"):
        ae.load_data(tmp_path / "new")
    assert path.read_bytes() == changed


def drawn_instead(folder, capsys):
    data = ae.load_data(folder)
    out = capsys.readouterr().out
    assert data.name == "drawn digits, not MNIST" and data.train_images.shape[1:] == (1, 28, 28)
    assert len(out.splitlines()) == 1 and "not MNIST" in out and "To get MNIST" in out
    return out


def test_a_download_that_arrives_damaged_is_not_used(server, tmp_path, capsys):
    packed = server / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    drawn_instead(tmp_path / "new", capsys)


def test_without_a_network_digits_are_drawn(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert "refused" in drawn_instead(tmp_path / "new", capsys)


@pytest.mark.parametrize("trickle", [False, True])
def test_a_network_that_hangs_does_not_hang_the_script(server, tmp_path, monkeypatch, capsys, trickle):
    monkeypatch.setattr(ae, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(ae, "DOWNLOAD_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        def answer():
            try:
                client, _ = silent.accept()
                while trickle:
                    client.sendall(b"x")
                    time.sleep(0.1)
                time.sleep(5)
            except OSError:
                pass
        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(ae.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        start = time.perf_counter()
        drawn_instead(tmp_path / "new", capsys)
        assert time.perf_counter() - start < 4
    assert socket.getdefaulttimeout() is None


# ---- The command line ------------------------------------------------------------------------------------------------

def command(*arguments, cwd, **environment):
    """Start the script as a user would, where no network answers."""
    return subprocess.Popen([sys.executable, HERE / "autoencoder.py", *arguments], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
                            env=os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
                                              "PYTHONUTF8": "1"} | environment,
                            # interrupts work even where the tests were started in the background, which ignores them
                            preexec_fn=None if os.name == "nt" else partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


def test_command_runs_without_data_and_without_network_on_any_console(tmp_path):
    process = command("--epochs", "1", "--width", "32", "--depth", "2", cwd=tmp_path, PYTHONUTF8="0",
                      PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert "not MNIST" in lines[0] and lines[1].startswith("epoch  1/1") and lines[-1] == "Success! (drawn digits, not MNIST)"
    assert "\r" not in out and (tmp_path / "pics" / "reconstruction_1.png").is_file()


def test_help_explains_every_option(tmp_path):
    process = command("--help", cwd=tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and not os.listdir(tmp_path)
    for option in "data epochs seed device pics lr loss regulariser strength depth width dropout feedback out trials workers".split():
        assert re.search(rf"--{option} .*\n?.*[a-z]{{3}}", out), option


@pytest.mark.parametrize("arguments, message", [
    (["--epochs", "0"], "1 or more"), (["--width", "900"], "from 1 to 800"), (["--loss", "mse"], "euclidean"),
    (["--device", "abacus"], "abacus"), (["--lr", "-1"], "lr must be"), (["--pics", "{file}"], "--pics"),
    (["--data", "{file}"], "--data"), (["search", "--width", "9"], "--width does not go with search"),
    (["--trials", "9"], "--trials does not go with train"), (["search", "--out", "{file}"], "--out")])
def test_bad_input_is_refused_in_one_line(tmp_path, arguments, message):
    (tmp_path / "file").write_text("in the way")
    process = command(*(a.format(file=tmp_path / "file") for a in arguments), cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and message in err.splitlines()[-1] and "Traceback" not in err and not out


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_interrupt_ends_quietly(tmp_path):
    process = command("--width", "32", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.strip() == "stopped"


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep to find the workers")
def test_interrupting_a_search_of_two_workers_leaves_its_trials_and_no_process(tmp_path):
    process = command("search", "--workers", "2", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("rung 1"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.rstrip().endswith("stopped")
    assert journal(tmp_path / "search")
    assert not subprocess.run(["pgrep", "-f", f"{HERE / 'autoencoder.py'} search"], capture_output=True, text=True).stdout


def test_import_has_no_side_effects(tmp_path):
    code = "import torch; s = torch.get_rng_state(); import autoencoder; assert torch.equal(s, torch.get_rng_state())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr and not os.listdir(tmp_path)


# ---- Generation and measurement --------------------------------------------------------------------------------------

@pytest.mark.parametrize("members", ["one", "classes"])
def test_density_has_the_moments_of_each_group(members):
    torch.manual_seed(0)
    codes, groups = torch.randn(300, 3).double() @ torch.randn(3, 3).double() + 1, torch.randint(3, (300,))
    if members == "one":
        groups = torch.zeros(300, dtype=torch.long)
    density = ae.fit_density(codes, F.one_hot(groups))
    for k in range(int(groups.max()) + 1):
        part = codes[groups == k].numpy()
        assert density.weights[k].item() == pytest.approx(len(part) / 300, rel=1e-4)
        assert np.allclose(density.means[k], part.mean(0), atol=1e-5)
        assert np.allclose(density.factors[k] @ density.factors[k].T, np.cov(part.T, bias=True), rtol=0.01, atol=0.01)


def test_em_climbs_and_finds_the_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    codes = torch.cat([centres[k] + torch.randn(n, 2) * (1 + k) for k, n in enumerate((500, 300, 200))])

    def likelihood(density):
        parts = [torch.distributions.MultivariateNormal(m.double(), scale_tril=f.double()).log_prob(codes.double())
                 for m, f in zip(density.means, density.factors)]
        return (torch.stack(parts, 1) + density.weights.double().log()).logsumexp(1).mean().item()
    start = F.one_hot(torch.cdist(codes, codes[[0, 1, 999]]).argmin(1))
    values = [likelihood(ae.fit_density(codes, start, steps)) for steps in (0, 1, 2, 5, 20)]
    assert values == sorted(values) and values[-1] > values[0] + 0.1
    density = ae.fit_density(codes, F.one_hot(torch.cdist(codes, centres).argmin(1)), steps=30)
    assert torch.allclose(density.weights, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)
    assert torch.allclose(density.means, centres, atol=0.6)


def test_generated_codes_follow_the_density():
    class Identity(nn.Module):
        def decode(self, h):
            return h
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    density = ae.Density(torch.tensor([0.25, 0.75]), torch.tensor([[9.0, 0.0], [-9.0, 1.0]]), torch.stack([factor, torch.eye(2)]))
    codes = ae.generate(Identity(), density, 40_000, seed=1)
    first = codes[:, 0] > 0
    assert first.float().mean().item() == pytest.approx(0.25, abs=0.01)
    for k, covariance in ((0, factor @ factor.T), (1, torch.eye(2))):
        part = codes[first == (k == 0)]
        assert torch.allclose(part.mean(0), density.means[k], atol=0.06)
        assert torch.allclose(torch.cov(part.T), covariance, atol=0.15)
    assert torch.equal(codes, ae.generate(Identity(), density, 40_000, seed=1))
    assert not torch.equal(codes, ae.generate(Identity(), density, 40_000, seed=2))


def test_codes_that_do_not_vary_can_be_sampled():
    density = ae.fit_density(torch.zeros(20, 4), torch.ones(20, 2) / 2, steps=3)
    assert all(part.isfinite().all() for part in density)


def test_frechet_distance_matches_known_values():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 5)), rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))  # not symmetric: another way than the script's
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(product.real).sum()
    distance = lambda a, b: ae.frechet_distance(torch.tensor(a), torch.tensor(b))
    assert distance(a, b) == pytest.approx(expected) == pytest.approx(distance(b, a))
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a, a + [3, 0, 4, 0, 0]) == pytest.approx(25)  # a shift costs its square
    assert distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * np.trace(np.cov(a.T)))  # (3 − 1)² tr C


def test_kernel_distance_matches_a_loop_and_is_unbiased():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 3)), rng.normal(size=(12, 3)) + 0.5
    k = lambda x, y: (x @ y / 3 + 1) ** 3
    values = []
    for x, y in ((a[:6], b[:6]), (a[6:], b[6:])):
        within = [np.mean([k(u[i], u[j]) for i in range(6) for j in range(6) if i != j]) for u in (x, y)]
        values.append(sum(within) - 2 * np.mean([k(u, v) for u in x for v in y]))
    mean, error = ae.kernel_distance(torch.tensor(a), torch.tensor(b), blocks=2)
    assert mean == pytest.approx(np.mean(values)) and error == pytest.approx(np.std(values, ddof=1) / 2 ** 0.5)
    same = [ae.kernel_distance(torch.randn(100, 3), torch.randn(100, 3))[0] for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200 ** 0.5 and min(same) < 0 < max(same)


def test_coverage_and_nearness_have_their_known_values():
    labels = torch.arange(1000) % 10
    assert ae.class_coverage(labels, labels) == pytest.approx(1)
    assert ae.class_coverage(labels[labels != 4], labels) == pytest.approx(0.9)
    assert ae.class_coverage(torch.zeros(50, dtype=torch.long), labels) == pytest.approx(0.1)
    torch.manual_seed(0)
    train, held_out = torch.rand(200, 5), torch.rand(100, 5)
    nearness = lambda images: ae.nearest_distance(images, train) / ae.nearest_distance(held_out, train)
    assert nearness(train[:50]) == pytest.approx(0, abs=1e-3)
    assert nearness(held_out) == pytest.approx(1)
    assert nearness(held_out + 10) > 10
    expected = np.median(np.sqrt(((held_out[:, None] - train) ** 2).sum(-1).numpy()).min(1))
    assert ae.nearest_distance(held_out, train) == pytest.approx(expected, rel=0.02)  # of an even count, torch takes the lower


@pytest.fixture(scope="session")
def judged():
    """A reference of 2,000 held-out digits, its feature network trained on other 3,000, and 2,000 more with labels."""
    images, labels = ae.draw_digits(9000, 3)
    x = images.flatten(1)
    features = ae.train_features(x[:3000], labels[:3000], epochs=8)
    return ae.Reference(features, x[3000:5000], x[5000:7000]), x[7000:], labels[7000:]


def test_features_tell_the_digits_apart(judged):
    reference, images, labels = judged
    assert (reference.features(images).argmax(1) == labels).float().mean() > 0.9
    assert reference.features.hidden(images).shape == (2000, 64)


def test_distances_grow_with_damage(judged):
    reference, images, labels = judged
    torch.manual_seed(0)
    noise = torch.randn_like(images)

    def blurred(times):
        x = images.view(-1, 1, 28, 28)
        for _ in range(times):
            x = F.avg_pool2d(x, 3, stride=1, padding=1)
        return x.flatten(1)

    def dropped(count):  # the images of the first `count` classes give way to others
        rest = images[labels >= count]
        return rest[torch.arange(2000) % len(rest)]
    for damage, levels in ((blurred, (0, 1, 2, 4)), (dropped, (0, 2, 4, 7)),
                           (lambda scale: (images + scale * noise).clamp(0, 1), (0, 0.1, 0.2, 0.4))):
        measured = [reference.measure(damage(level)) for level in levels]
        for key in ("frechet", "kernel"):
            values = [m[key] for m in measured]
            assert values == sorted(values) and values[-1] > 3 * abs(values[0]), (key, values)
        if damage is dropped:
            assert [m["coverage"] for m in measured] == sorted((m["coverage"] for m in measured), reverse=True)


def test_floor_and_ceiling_enclose(judged):
    reference, images, _ = judged
    real, floor, ceiling = reference.measure(images), reference.floor(), reference.ceiling()
    assert real["frechet"] < ceiling["frechet"] and floor["frechet"] < ceiling["frechet"]
    assert floor["nearness"] < 0.01 and 0.8 < real["nearness"] < 1.2 and real["coverage"] > 0.85


# ---- The search ------------------------------------------------------------------------------------------------------

def run_search(digits, folder, monkeypatch, **options):
    monkeypatch.setattr(ae, "load_data", lambda folder, seed: digits)
    threads = torch.get_num_threads()
    try:
        return ae.search(**{"out": folder, "epochs": 0.9, "trials": 9, "device": "cpu"} | options)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def searched(digits, tmp_path_factory):
    """A whole search of nine settings by one worker: its choice, its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(io.StringIO()) as out:
        return run_search(digits, folder, monkeypatch), folder, out.getvalue()


def pretend(settings, seed, epochs, splits, reference):
    """A stand-in for run_trial, where only the bookkeeping is under test."""
    picture = io.BytesIO()
    Image.new("L", (560, 28)).save(picture, "PNG")
    return {"frechet": settings["width"] / epochs + seed % 7, "kernel": 0.0, "kernel_error": 0.0, "coverage": 1.0, "nearness": 1.0,
            "mse": settings["lr"], "seconds": 0.0, "digits": base64.b64encode(picture.getvalue()).decode()}


def journal(folder):
    return [json.loads(line) for line in (Path(folder) / "trials.jsonl").read_text().splitlines()]


def test_splits_are_disjoint(digits):
    marked = digits._replace(train_images=torch.arange(4000).float().view(4000, 1, 1, 1))
    splits = ae.Splits(marked)
    parts = [splits.train, splits.features, splits.choice, splits.confirmation]
    assert [len(images) for images, _ in parts] == [2668, 666, 333, 333]
    numbers = torch.cat([images for images, _ in parts]).flatten().long()
    assert sorted(numbers.tolist()) == list(range(4000))
    assert torch.equal(torch.cat([labels for _, labels in parts]), digits.train_labels[numbers])


def test_drawn_settings_are_valid_varied_and_repeatable():
    drawn = [ae.draw_settings(trial, 3) for trial in range(60)]
    assert drawn == [ae.draw_settings(trial, 3) for trial in range(60)] != [ae.draw_settings(trial, 4) for trial in range(60)]
    parameters = inspect.signature(ae.AutoEncoder).parameters
    assert drawn[0] == {name: parameters[name].default for name in ae.MODEL_SPACE if name != "lr"} | {"lr": 1e-3}
    for settings in drawn:
        ae.check_limits(ae.make_model(settings))
    for name in ("loss", "regulariser", "depth", "feedback"):
        assert len({settings[name] for settings in drawn}) == {"loss": 4, "regulariser": 3, "depth": 3, "feedback": 2}[name]


def test_simplest_within_one_standard_error_is_chosen():
    scores = {"best": [1.0, 1.2, 1.1], "close": [1.12, 1.15, 1.14], "far": [2.0, 2.1, 2.2]}
    assert ae.choose_simplest(scores, {"best": 3, "close": 2, "far": 1}) == "close"
    assert ae.choose_simplest(scores, {"best": 2, "close": 3, "far": 1}) == "best"
    assert ae.choose_simplest({"a": [1.0]}, {"a": 1}) == "a"


def test_missing_classes_copies_and_divergence_rank_last():
    good = {"coverage": 0.95, "nearness": 1.0, "frechet": 9.0}
    records = [good, good | {"coverage": 0.5, "frechet": 1.0}, good | {"nearness": 0.01, "frechet": 0.0},
               good | {"frechet": float("inf"), "coverage": 0.0}]
    assert min(records, key=ae.rank_key) is good and sorted(records, key=ae.rank_key)[-1] is records[-1]


def test_a_setting_that_diverges_is_recorded_not_raised(judged, digits):
    splits = ae.Splits(digits)  # Adam's step is its rate, so that a huge one makes the parameters overflow
    record = ae.run_trial({"lr": 1e30}, 0, 0.2, splits, judged[0])
    assert record["frechet"] == float("inf") and record["digits"]


def test_search_halves_confirms_and_ends_with_a_command_that_works(searched):
    winner, folder, out = searched
    records = journal(folder)
    assert [sum(r["job"].startswith(stage) for r in records) for stage in ("rung 1", "confirm", "test")] == [9, 9, 9]
    rung = sorted((r for r in records if r["job"].startswith("rung 1")), key=ae.rank_key)
    confirmed = {int(r["job"].split()[2]) for r in records if r["job"].startswith("confirm")}
    assert confirmed == {int(r["job"].split()[3]) for r in rung[:3]}
    assert {r["split"] for r in records} == {"choice", "confirmation", "test"}
    assert len({(r["seed"], r["job"].split()[0]) for r in records}) == 7  # one seed, then three fresh ones, and three more
    assert winner in [ae.draw_settings(trial) for trial in confirmed]
    assert Image.open(folder / "contact_sheet.png").size == (64 + 20 * 28, 9 * 30)
    for label in ("real images", "winner", "default", "784-400-20", "PCA-Gaussian"):
        assert re.search(rf"^{label} +[\d.]+", out, re.M)
    arguments = out.splitlines()[-1].split("autoencoder.py ")[1].split()
    chosen = dict(zip(arguments[::2], arguments[1::2]))
    assert {name: str(value) for name, value in winner.items()} == {name[2:]: value for name, value in chosen.items()}
    assert re.search(r"about \d+ s left", out)


def test_an_interrupted_search_goes_on_where_it_stopped(digits, tmp_path, monkeypatch):
    runs = []

    def interrupted(settings, *rest):
        runs.append(settings)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return pretend(settings, *rest)
    monkeypatch.setattr(ae, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_search(digits, tmp_path / "a", monkeypatch)
    before = journal(tmp_path / "a")
    assert len(before) == 4
    with open(tmp_path / "a" / "trials.jsonl", "a") as file:
        file.write(json.dumps(before[0] | {"search": "another", "job": "rung 1 trial 8 seed 0", "frechet": -1.0}) + "\n")
        file.write('{"search": "damaged')
    winner = run_search(digits, tmp_path / "a", monkeypatch)
    lines = (tmp_path / "a" / "trials.jsonl").read_text().splitlines()
    assert lines[:4] == [json.dumps(record) for record in before] and lines[5] == '{"search": "damaged'
    jobs = [json.loads(line)["job"] for i, line in enumerate(lines) if i not in (4, 5)]
    assert len(jobs) == len(set(jobs)) == 27 and len(runs) == 1 + 27
    assert run_search(digits, tmp_path / "a", monkeypatch) == winner and len(runs) == 1 + 27  # nothing is left to do
    monkeypatch.setattr(ae, "run_trial", pretend)
    assert run_search(digits, tmp_path / "b", monkeypatch) == winner
    strip = lambda folder: {r["job"]: r["frechet"] for r in journal(folder)}
    (tmp_path / "a" / "trials.jsonl").write_text("\n".join(line for i, line in enumerate(lines) if i not in (4, 5)))
    assert strip(tmp_path / "a") == strip(tmp_path / "b")


def test_trials_of_another_search_are_not_mixed_in(digits, tmp_path, monkeypatch):
    searches = [{"trials": 3, "epochs": 0.1}, {"trials": 3, "epochs": 0.2}, {"trials": 3, "epochs": 0.1, "seed": 7},
                {"trials": 4, "epochs": 0.1}]
    monkeypatch.setattr(ae, "run_trial", pretend)
    for options in searches:
        run_search(digits, tmp_path, monkeypatch, **options)
    monkeypatch.setattr(ae.torch, "__version__", "another")
    run_search(digits, tmp_path, monkeypatch, **searches[0])
    records = journal(tmp_path)
    assert len({r["search"] for r in records}) == 5 and len(records) == 3 * 21 + 22 + 21


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import autoencoder as ae
data = ae.Data(*ae.draw_digits(4000, 1), *ae.draw_digits(500, 2), "drawn digits, not MNIST")
ae.load_data = lambda folder, seed: data
print("chosen", ae.search(out=sys.argv[2], epochs=0.9, trials=9, device="cpu"), flush=True)
"""


def start_workers(folder, count):
    (folder / "worker.py").write_text(WORKER)
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                             folder / "worker.py", HERE, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def test_two_workers_share_the_trials_and_choose_what_one_chooses(searched, tmp_path):
    winner, one, _ = searched
    out, err = start_workers(tmp_path, 2).communicate(timeout=300)
    assert re.findall("^chosen (.*)$", out, re.M) == [str(winner)] * 2, err
    values = [sorted((r["job"], r["frechet"], r["mse"]) for r in journal(folder)) for folder in (one, tmp_path)]
    assert values[0] == values[1] and len(values[0]) == 27


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep to find the workers")
def test_a_worker_that_dies_loses_no_finished_trial(digits, tmp_path, monkeypatch):
    process = start_workers(tmp_path, 2)
    for line in process.stdout:
        if line.startswith("rung"):
            break
    for child in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[:1]:
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    finished = journal(tmp_path)
    assert finished
    monkeypatch.setattr(ae, "run_trial", pretend)
    run_search(digits, tmp_path, monkeypatch)
    records = journal(tmp_path)
    assert records[:len(finished)] == finished and len({r["job"] for r in records}) == len(records) == 27


# ---- The answers' evidence -------------------------------------------------------------------------------------------
#
# Each table of our own figures in ANSWERS.md stands between <!-- test_answer_x --> and <!-- end -->. The function x below
# measures it, the test test_answer_x measures it again and compares, `python test_autoencoder.py answers` writes it anew.

SEEDS = (0, 1, 2)  # of all that is random: initialisation, order, generated digits, feature networks
ANSWERS = HERE / "ANSWERS.md"
EVIDENCE = {}  # name of a test → the function that measures its table


class Table(NamedTuple):
    """A table in ANSWERS.md: `columns`, header → decimals; `rows`, label → one record for each seed, header → value."""

    first: str
    columns: dict
    rows: dict
    sheet: list = []  # records of generated digits, for a picture beside the table

    def lines(self):
        """In Markdown; a cell is the mean ± standard deviation over the records."""
        return [f"| {self.first} | {' | '.join(self.columns)} |", "|---" * (len(self.columns) + 1) + "|"] + [
            f"| {label} | {' | '.join(ae.mean_sd(records, column, digits) for column, digits in self.columns.items())} |"
            for label, records in self.rows.items()]

    def values(self):
        """(row, column) → the values, one for each seed."""
        return {(label, column): np.array([record[column] for record in records])
                for label, records in self.rows.items() for column in self.columns if column in records[0]}


def evidence(function):
    """Mark `function` as the measurement of the table test_answer_<its name>; it is made once a session."""
    EVIDENCE[f"test_answer_{function.__name__}"] = function = cache(function)
    return function


@cache
def crew():
    pool = multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,))
    atexit.register(pool.terminate)
    return pool


def in_parallel(function, jobs):
    """`function` of each job, in order, by processes of one thread each: the same figures however many there are."""
    return crew().starmap(function, jobs, chunksize=1)


def written_table(name):
    """The lines of the table `name` in ANSWERS.md."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", ANSWERS.read_text(encoding="utf-8"), re.S)[1].splitlines()


def figures(lines):
    """The cells of a Markdown table: (row, column) → (mean, spread, allowance).

    The allowance is three times the spread and a unit of the last decimal. Three seeds can agree by chance: where they do,
    the spread that is usual in the column, in proportion to the mean, stands in.
    """
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    cells = {}
    for label, *row in rows:
        for column, cell in zip(header[1:], row, strict=True):
            if cell:
                mean, _, spread = cell.partition(" ± ")
                cells[label, column] = float(mean), float(spread or 0), 10.0 ** -len(mean.partition(".")[2])
    usual = {column: np.median([spread / abs(mean) for (_, c), (mean, spread, _) in cells.items() if c == column and mean] or 0)
             for column in header[1:]}
    return {key: (mean, spread, 3 * max(spread, usual[key[1]] * abs(mean)) + unit)
            for key, (mean, spread, unit) in cells.items()}


def compare(written, measured):
    """Assert that the figures of a written table are those measured, within the allowance; a time may be half or twice."""
    assert written.keys() == measured.keys(), "the table has other rows or columns than its measurement: write it anew"
    for key, (mean, spread, allowance) in written.items():
        found, found_spread, found_allowance = measured[key]
        if "time" in key[1]:
            right = mean / 2 <= found <= 2 * mean
        else:
            right = abs(found - mean) <= allowance and spread <= found_allowance
        assert right, f"{', '.join(key)}: {mean} ± {spread} is written, {found} ± {found_spread} was measured"


@pytest.fixture
def measured(request):
    """The table of the test that asks for it, measured, and compared with the one written: (row, column) → values."""
    table = EVIDENCE[request.node.name]()
    compare(figures(written_table(request.node.name)), figures(table.lines()))
    return table.values()


@cache
def splits():
    return ae.Splits(ae.load_data(MNIST_FOLDER))


@cache
def features(seed):
    return ae.train_features(*splits().features, seed)


@cache
def reference(seed, split="choice"):
    """Held-out images, and the features of a network trained with this seed."""
    return ae.Reference(features(seed), getattr(splits(), split)[0], splits().train[0])


@cache
def other_features(seed):
    """What else a distance may look at: the hidden layer of an untrained network, and 64 principal components of pixels."""
    torch.manual_seed(seed)
    untrained = ae.Features().eval().requires_grad_(False).hidden
    directions = torch.linalg.eigh(torch.cov(splits().train[0].T).double()).eigenvectors[:, -64:].float()
    return {"untrained": untrained, "pixels": lambda images: images @ directions}


RANDOM = [ae.draw_settings(trial) for trial in range(1, 10)]
SENSIBLE = {"784-400-20, no feedback": ae.PLAIN, "**default**, code of 20": ae.DEFAULT,
            **{f"code of {size}": ae.DEFAULT | {"hid_size": size} for size in (10, 40, 80)},
            "loss: squared": ae.DEFAULT | {"loss": "squared"}, "loss: cross-entropy": ae.DEFAULT | {"loss": "cross-entropy"},
            "code penalty 0.01": ae.DEFAULT | {"regulariser": "code", "strength": 1e-2}}
SIZES = (250, 500, 1000, 2500, 5000)


def judge(images, seed):
    """What scores say of as many images as the choice split has, and twenty of them."""
    measures, p = reference(seed).measure(images), reference(seed).features(images).softmax(1)
    inception = (p * (p.clamp(min=1e-12).log() - p.mean(0).log())).sum(1).mean().exp().item()
    return measures | {"Fréchet": measures["frechet"], "Inception score": inception, "digits": ae.to_strip(images)}


def look(settings, seed):
    """One setting, trained for a third of an epoch and for a whole one, and all that the answers measure of it."""
    images, choice = splits().train[0], reference(seed)
    hidden, count, record = choice.features.hidden, len(choice.images), {}
    for epochs in (1 / 3, 1):
        model = ae.train_setting(settings, seed, epochs, *splits().train)
        generated = ae.generate(model, ae.fit_generator(model, images), count, seed)
        record = {"Fréchet after a third": record.get("Fréchet")} | judge(generated, seed)
    with torch.no_grad():
        record["squared error"] = (model(choice.images) - choice.images).square().mean().item()
        codes = model.encode(images[:10_000])
    single = ae.generate(model, ae.fit_density(codes, torch.ones(len(codes), 1)), count, seed)
    record["one Gaussian"] = ae.frechet_distance(hidden(single), choice.hidden)
    h = hidden(generated)
    for n in SIZES:
        for split in ("choice", "confirmation"):
            record[f"Fréchet, {n} {split}"] = ae.frechet_distance(h[:n], reference(seed, split).hidden[:n])
        record[f"kernel, {n}"] = ae.kernel_distance(h[:n], choice.hidden[:n])[0]
    return record | {name: ae.frechet_distance(view(generated), view(choice.images))
                     for name, view in other_features(seed).items()}


@cache
def looked():
    """`look` at every setting and seed: (setting, seed) → record, of RANDOM by number and of SENSIBLE by name."""
    settings = dict(enumerate(RANDOM)) | SENSIBLE
    jobs = [(settings[name], seed) for seed in SEEDS for name in settings]
    return dict(zip([(name, seed) for seed in SEEDS for name in settings], in_parallel(look, jobs)))


def criterion(name, group, seed):
    """What `name` says of each setting of a group, in order."""
    return np.array([looked()[setting, seed][name] for setting in group])


@evidence
def sensible():
    columns = {"squared error": 4, "Fréchet": 3, "kernel": 4}
    return Table("setting", columns, {name: [looked()[name, seed] for seed in SEEDS] for name in SENSIBLE},
                 [looked()[name, SEEDS[0]] for name in SENSIBLE])


def rank_correlation(a, b):
    """Spearman's."""
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


def agreement(names):
    """How far each criterion ranks settings as the Fréchet distance does, and what its choice costs by that."""
    rows = {}
    for label, name, shift in names:
        rows[label] = []
        for seed in SEEDS:
            record = {}
            for title, group in (("rank correlation, random", range(len(RANDOM))), ("rank correlation, sensible", SENSIBLE)):
                says, target = criterion(name, group, (seed + shift) % len(SEEDS)), criterion("Fréchet", group, seed)
                record[title] = rank_correlation(says, target)
            rows[label].append(record | {"Fréchet of its choice ÷ lowest": target[says.argmin()] / target.min()})
    return Table("criterion", {column: 2 for column in record} | {"Fréchet of its choice ÷ lowest": 2}, rows)


@evidence
def rankings():
    return agreement([("squared error", "squared error", 0),
                      ("Fréchet after a third of the training", "Fréchet after a third", 0),
                      ("Fréchet with another seed", "Fréchet", 1)])


@evidence
def metrics():
    return agreement([("kernel distance", "kernel", 0), ("Fréchet on 500 images", "Fréchet, 500 choice", 0),
                      ("Fréchet in an untrained network", "untrained", 0),
                      ("Fréchet in pixels (64 principal components)", "pixels", 0),
                      ("Fréchet, codes drawn from one Gaussian", "one Gaussian", 0)])


@evidence
def searches(replays=500):
    """Searches replayed on the trainings at hand: chosen with one seed, then judged by a fresh one on fresh images.

    A record is for a pair of seeds, each of which chooses once and judges once.
    """
    everything, random = [*range(len(RANDOM)), *SENSIBLE], np.random.default_rng(0)

    def best(among, name, seed):
        return among[criterion(name, among, seed).argmin()]

    def halve(among, seed):
        third = criterion("Fréchet after a third", among, seed)
        return best([among[i] for i in third.argsort()[:len(among) // 3]], "Fréchet", seed)
    draw = lambda count: [everything[i] for i in random.choice(len(everything), count, replace=False)]
    full = "Fréchet", "Fréchet, 5000 confirmation"
    strategies = {  # label → how it chooses, and the score that it goes by, of its own seed and of another
        "none, 1 setting": (lambda seed: draw(1)[0], full),
        "random, 6 settings": (lambda seed: best(draw(6), "Fréchet", seed), full),
        "random, 6 settings, by squared error": (lambda seed: best(draw(6), "squared error", seed), None),
        "random, 12 settings, twice the cost": (lambda seed: best(draw(12), "Fréchet", seed), full),
        "halving, 9 settings to 3": (lambda seed: halve(draw(9), seed), full),
        "the 8 sensible": (lambda seed: best(list(SENSIBLE), "Fréchet", seed), full),
        "the 8 sensible, on 500 images": (lambda seed: best(list(SENSIBLE), "Fréchet, 500 choice", seed),
                                          ("Fréchet, 500 choice", "Fréchet, 500 confirmation"))}
    rows = {label: [] for label in strategies}
    for label, (choose, scores) in strategies.items():
        for pair in itertools.combinations(SEEDS, 2):
            reached, excess = [], []
            for chooser, fresh in (pair, pair[::-1]):
                for _ in range(replays if "sensible" not in label else 1):
                    choice = choose(chooser)
                    reached.append(looked()[choice, fresh]["Fréchet, 5000 confirmation"])
                    if scores:
                        excess.append(np.log(looked()[choice, fresh][scores[1]] / looked()[choice, chooser][scores[0]]))
            record = {"Fréchet of the choice, afresh": np.mean(reached)}
            rows[label].append(record | ({"afresh ÷ as chosen": np.exp(np.mean(excess))} if scores else {}))
    return Table("search", {"Fréchet of the choice, afresh": 3, "afresh ÷ as chosen": 2}, rows)


def fool(seed):
    """Images that a score should tell from digits, or from new digits; and distances of few real images to few others."""
    order = torch.randperm(len(splits().confirmation[0]), generator=torch.Generator().manual_seed(seed))
    real, labels = (part[order] for part in splits().confirmation)
    choice = reference(seed)
    surest = real[choice.features(real).softmax(1).argmax(0)]
    blurred = F.avg_pool2d(real.view(-1, 1, 28, 28), 3, stride=1, padding=1).flatten(1)
    others = real[labels != 4]
    sets = {"real digits": real, "copies of training digits": splits().train[0][order],
            "real, but no 4": others[torch.arange(len(real)) % len(others)], "real, but blurred": real.lerp(blurred, BLUR),
            "ten real digits, 500 times each": surest.repeat(len(real) // 10, 1)}
    few = {}
    for n in SIZES:
        a, b = choice.features.hidden(real[:n]), choice.hidden[order[:n]]
        few[n] = {"real": ae.frechet_distance(a, b), "kernel, real": ae.kernel_distance(a, b)[0]}
    return {name: judge(images, seed) for name, images in sets.items()}, few


BLUR = 0.85  # as much as costs what a missing class does


@cache
def fooling():
    return in_parallel(fool, [(seed,) for seed in SEEDS])


@evidence
def fooled():
    rows = {name: [records[name] for records, _ in fooling()] for name in fooling()[0][0]}
    rows["**default** autoencoder"] = [looked()["**default**, code of 20", seed] for seed in SEEDS]
    return Table("images", {"Fréchet": 3, "kernel": 4, "Inception score": 2, "coverage": 2, "nearness": 2}, rows,
                 [records[0] for records in rows.values()])


@evidence
def sample_size():
    rows = {}
    for n in SIZES:
        rows[f"{n}"] = []
        for seed in SEEDS:
            default, plain = looked()["**default**, code of 20", seed], looked()["784-400-20, no feedback", seed]
            rows[f"{n}"].append(fooling()[seed][1][n] | {"default": default[f"Fréchet, {n} choice"],
                                "784-400-20": plain[f"Fréchet, {n} choice"], "kernel, default": default[f"kernel, {n}"]})
    return Table("images", {"real": 3, "default": 3, "784-400-20": 3, "kernel, real": 4, "kernel, default": 4}, rows)


@needs_mnist
def test_answer_sensible(measured):
    mean = {key: values.mean() for key, values in measured.items()}
    codes = ["code of 10", "**default**, code of 20", "code of 40", "code of 80"]
    errors, distances = ([mean[name, column] for name in codes] for column in ("squared error", "Fréchet"))
    assert errors == sorted(errors, reverse=True)
    assert distances[1] == min(distances) and distances[3] > 1.1 * distances[1]


@needs_mnist
def test_answer_rankings(measured):
    mean = {key: values.mean() for key, values in measured.items()}
    for criterion, _ in mean:
        assert mean[criterion, "rank correlation, random"] > 0.75
    for criterion in ("squared error", "Fréchet after a third of the training"):
        assert abs(mean[criterion, "rank correlation, sensible"]) < 0.5
    assert mean["Fréchet with another seed", "rank correlation, sensible"] < 0.9
    assert mean["squared error", "Fréchet of its choice ÷ lowest"] > 1.1


@needs_mnist
def test_answer_searches(measured):
    reached, excess = ({label: values.mean() for (label, c), values in measured.items() if c == column}
                       for column in ("Fréchet of the choice, afresh", "afresh ÷ as chosen"))
    assert all(value > excess["none, 1 setting"] + 0.05 for label, value in excess.items() if not label.startswith("none"))
    assert 1 < excess["none, 1 setting"] < 1.2 and excess["the 8 sensible"] > excess["random, 6 settings"]
    assert abs(excess["the 8 sensible, on 500 images"] - excess["the 8 sensible"]) < 0.2
    assert abs(reached["halving, 9 settings to 3"] - reached["random, 6 settings"]) < 0.03
    assert max(value for label, value in reached.items() if not label.startswith("none")) < reached["none, 1 setting"] / 3


@needs_mnist
def test_answer_metrics(measured):
    mean = {key: values.mean() for key, values in measured.items()}
    for view in ("an untrained network", "pixels (64 principal components)"):
        assert mean[f"Fréchet in {view}", "rank correlation, random"] > 0.75
        assert mean[f"Fréchet in {view}", "rank correlation, sensible"] < 0.6
    for view in ("untrained", "pixels"):
        assert all(list(SENSIBLE)[criterion(view, SENSIBLE, seed).argmin()] == "code of 80" for seed in SEEDS), view
    assert mean["Fréchet, codes drawn from one Gaussian", "rank correlation, sensible"] < 0.6


@needs_mnist
def test_answer_sample_size(measured):
    real = [measured[f"{n}", "real"].mean() for n in SIZES]
    assert real == sorted(real, reverse=True) and real[0] > 8 * real[-1]
    assert measured["250", "default"].mean() < 1.5 * real[0] and measured["5000", "default"].min() > 1.5 * real[-1]
    gap = measured["5000", "kernel, default"].mean()
    assert measured["250", "kernel, default"].std(ddof=1) > 2 * gap


@needs_mnist
def test_answer_fooled(measured):
    of = lambda column: {label: values for (label, c), values in measured.items() if c == column}
    frechet, score, coverage, nearness = map(of, ("Fréchet", "Inception score", "coverage", "nearness"))
    assert frechet["copies of training digits"].mean() == pytest.approx(frechet["real digits"].mean(), rel=0.25)
    assert (frechet["copies of training digits"] < frechet["**default** autoencoder"] / 1.5).all()
    assert (frechet["real, but blurred"] > 3 * frechet["**default** autoencoder"]).all()
    assert nearness["copies of training digits"].max() < 0.01 < 0.5 < min(values.min() for label, values in nearness.items()
                                                                         if not label.startswith("copies"))
    assert frechet["real, but blurred"].mean() == pytest.approx(frechet["real, but no 4"].mean(), rel=0.25)
    assert (coverage["real, but no 4"] < coverage["real, but blurred"] - 0.05).all()
    assert all((score["ten real digits, 500 times each"] > values).all() for label, values in score.items() if "ten" not in label)


# Other 1: uncertainty. Networks are lists of weights and biases, with a leading dimension for members side by side.

MEMBERS, MASKS, DROPOUT = 5, 50, 0.2
LABELLED, VALIDATION, TRANSFER = 2000, 1000, 40_000  # images of a seed's own; inputs of a distillation
STEPS, MORE_STEPS = 4000, 3000  # of a member; of a student that starts from one, and of its rival that goes on with labels
CAP = 1e4  # of a Dirichlet's precision, infinite where the members agree


def logits(net, x, dropout=0.0):
    """Images (n, 784), or (members, n, 784), → (members, n, 10), through 784-200-200-10."""
    x = x.expand(len(net[0]), -1, -1)
    for i in range(3):
        x = torch.baddbmm(net[2 * i + 1], F.dropout(F.relu(x), dropout) if i else x, net[2 * i])
    return x


def make_networks(members):
    sizes = (784, 200, 200, 10)
    return [part for a, b in zip(sizes, sizes[1:])
            for part in (torch.randn(members, a, b) * (2 / a) ** 0.5, torch.zeros(members, 1, b))]


def fit(start, loss, inputs, targets, steps, dropout=0.0, batch=100):
    """Networks trained from `start` by Adam, its rate falling to 0 in a straight line; each has its own order of the inputs."""
    net, members = [part.clone().requires_grad_() for part in start], len(start[0])
    optimizer = torch.optim.Adam(net, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        begin = step * batch % len(inputs)
        if begin == 0:
            order = torch.stack([torch.randperm(len(inputs)) for _ in range(members)])
        picked = order[:, begin:begin + batch]
        optimizer.zero_grad()
        loss(logits(net, inputs[picked], dropout), targets[picked]).backward()
        optimizer.step()
        schedule.step()
    return [part.detach() for part in net]


def label_loss(z, labels):
    """Cross-entropy, summed over the members and averaged over the images."""
    return F.cross_entropy(z.flatten(0, 1), labels.flatten()) * len(z)


def mean_loss(z, log_p):
    """Cross-entropy to the mean of the teacher's members, log p (..., members, 10): Hinton et al. 2015."""
    return -(log_p.exp().mean(-2) * z.log_softmax(-1)).sum(-1).mean()


def dirichlet_loss(z, log_p):
    """KL(Dir(α) ‖ Dir(β)) / β₀ up to a constant: α = exp(z) + 1, β = β₀ p̄ + 1 (Ryabinin et al. 2021, with our correction)."""
    members, mean = log_p.shape[-2], log_p.exp().mean(-2)
    spread = (mean * (mean.clamp(min=1e-30).log() - log_p.mean(-2))).sum(-1)
    precision = ((members - 1) / members * 9 / (2 * spread.clamp(min=1e-9))).clamp(max=CAP)
    alpha = z.exp() + 1
    expected = alpha.digamma() - alpha.sum(-1, keepdim=True).digamma()
    return -((mean * expected).sum(-1) + torch.distributions.Dirichlet(alpha).entropy() / precision).mean()


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1)


def single(net, x):
    """log p (n, 10); no knowledge uncertainty."""
    return logits(net, x)[0].log_softmax(-1), None


def averaged(sample, x):
    """Of logits (samples, n, 10): log of the mean prediction, and the mutual information of class and sample."""
    log_p = sample(x).log_softmax(-1)
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return mean, entropy(mean) - entropy(log_p).mean(0)


def dirichlet(net, x):
    """Of a student: log p, and the mutual information of class and p under Dir(α)."""
    z = logits(net, x)[0]
    alpha = z.exp() + 1
    total = alpha.sum(-1, keepdim=True)
    p = alpha / total
    return z.log_softmax(-1), entropy(p.log()) + (p * ((alpha + 1).digamma() - (total + 1).digamma())).sum(-1)


def warp(images, affine):
    grid = F.affine_grid(affine, [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 28, 28), grid, align_corners=False).flatten(1)


def augment(images, mix):
    """TRANSFER copies, and which image each shows: scaled and shifted by up to 7 %, noisy, a part `mix` blended with others."""
    n = TRANSFER
    source, share, zero = torch.arange(n) % len(images), torch.rand(n, 1), torch.zeros(n)
    share[torch.rand(n) >= mix] = 1.0
    blend = share * images[source] + (1 - share) * images[torch.randint(len(images), (n,))]
    wide, high, right, down = (torch.rand(4, n) * 2 - 1) * 0.07
    affine = torch.stack([1 + wide, zero, right, zero, 1 + high, down], dim=1).view(n, 2, 3)
    return (warp(blend, affine) + torch.rand(n, 1) * 0.1 * torch.randn(n, 784)).clamp(0, 1), source


def auroc(high, low):
    """The chance that a value of `high` exceeds one of `low`, ties counting half."""
    return ((high[:, None] > low).float().mean() + (high[:, None] >= low).float().mean()).item() / 2


def glue(images, labels):
    """Upper halves of the first half of the images on lower halves of the others, where the two are of different classes."""
    n = len(images) // 2
    return torch.cat([images[:n, :392], images[n:2 * n, 392:]], dim=1)[labels[:n] != labels[n:2 * n]]


def calibration_error(log_p, labels, bins=15):
    """Mean gap of confidence and accuracy over equal bins of confidence, weighted by their images (Guo et al. 2017)."""
    confidence, guess = log_p.exp().max(-1)
    gaps = torch.zeros(bins).index_add_(0, (confidence * bins).long().clamp(max=bins - 1), (guess == labels).float() - confidence)
    return gaps.abs().sum().item() / len(labels)


def doubt(seed):
    """All methods of Other 1, trained and measured with one seed: row → record."""
    torch.manual_seed(seed)
    size = LABELLED + VALIDATION
    (images, valid), (labels, valid_labels) = (
        part[seed * size:(seed + 1) * size].split([LABELLED, VALIDATION]) for part in splits().train)
    copies, source = augment(images, mix=0.0)
    nets = fit(make_networks(MEMBERS), label_loss, copies, labels[source], STEPS, DROPOUT)
    first, ensemble = [part[:1] for part in nets], partial(averaged, partial(logits, nets))
    longer = fit(first, label_loss, copies, labels[source], MORE_STEPS, DROPOUT)
    masked = lambda x: torch.cat([logits(first, x, DROPOUT) for _ in range(MASKS)])
    methods = {"one network, as it is": partial(single, first), "one network": partial(single, first),
               "one network, trained longer": partial(single, longer), f"MC dropout, {MASKS} masks": partial(averaged, masked),
               "ensemble of 5": ensemble}
    for name, x in (("clean", images), ("augmented", augment(images, mix=0.5)[0])):
        taught = torch.cat([logits(nets, part).log_softmax(-1).transpose(0, 1) for part in x.split(1000)])  # (n, members, 10)
        methods[f"distilled Dirichlet, {name} inputs"] = partial(dirichlet, fit(first, dirichlet_loss, x, taught, MORE_STEPS))
    methods[f"distilled mean, {name} inputs"] = partial(single, fit(first, mean_loss, x, taught, MORE_STEPS))

    digits, truth = (part[:5000] for part in splits().test)
    turn = torch.tensor([[math.cos(math.pi / 6), -math.sin(math.pi / 6), 0], [math.sin(math.pi / 6), math.cos(math.pi / 6), 0]])
    inputs = {"clean": digits, "turned": warp(digits, turn.expand(len(digits), 2, 3)), "glued": glue(digits, truth),
              "noise": torch.rand(2000, 784)}
    seen = {row: {name: [torch.cat(parts) if parts[0] is not None else None for parts in zip(*map(method, x.split(1000)))]
                  for name, x in inputs.items()} for row, method in methods.items()}

    def calibrated(row):
        """log p of all inputs at the row's own temperature."""
        held_out, rates = methods[row](valid)[0], torch.logspace(-1, 1, 201, base=4).tolist()
        rate = 1.0 if row.endswith("as it is") else min(rates, key=lambda t: F.cross_entropy(held_out / t, valid_labels).item())
        return {name: (p / rate).log_softmax(-1) for name, (p, _) in seen[row].items()}
    predicted, rows = {row: calibrated(row) for row in methods}, {}
    for row, log_p in predicted.items():
        total = {name: entropy(p) for name, p in log_p.items()}
        wrong = torch.cat([log_p[name].argmax(-1) != truth for name in ("clean", "turned")])
        both = torch.cat([total["clean"], total["turned"]])
        record = rows[row] = {"accuracy": (log_p["clean"].argmax(-1) == truth).float().mean().item(),
                              "errors": auroc(both[wrong], both[~wrong])}
        for name, where in (("clean", ""), ("turned", ", turned")):
            record |= {f"NLL{where}": F.cross_entropy(log_p[name], truth).item(),
                       f"ECE{where}": calibration_error(log_p[name], truth)}
        for name in ("glued", "noise"):
            record[name] = auroc(total[name], total["clean"])
            if seen[row][name][1] is not None:
                record[f"{name}, knowledge"] = auroc(seen[row][name][1], seen[row]["clean"][1])
        record["passes"] = {f"MC dropout, {MASKS} masks": MASKS, "ensemble of 5": MEMBERS}.get(row, 1)
        if row.startswith("distilled") or row.endswith("longer"):
            for name, where in (("clean", "digits"), ("glued", "glued")):
                p, q, own = log_p[name], predicted["ensemble of 5"][name], seen[row][name][1]
                record[f"KL, {where}"] = (q.exp() * (q - p)).sum(-1).mean().item()
                record[f"disagreement, {where}"] = rank_correlation(total[name] if own is None else own,
                                                                    seen["ensemble of 5"][name][1])

    times = {row: [] for row in methods}
    for repeat in range(6):
        for row, method in methods.items():
            start = time.perf_counter()
            method(digits[:1000])
            times[row].append(time.perf_counter() - start)
    for row in rows:
        rows[row]["time"] = np.median(times[row][1:]) / np.median(times["one network"][1:])
    return rows


@cache
def doubted():
    by_seed = [experiments()[doubt, seed] for seed in SEEDS]
    return {row: [rows[row] for rows in by_seed] for row in by_seed[0]}


@evidence
def uncertainty():
    columns = {"accuracy": 3, "NLL": 3, "ECE": 3, "NLL, turned": 2, "ECE, turned": 2, "errors": 3, "glued": 3, "glued, knowledge": 3,
               "noise": 2, "passes": 0, "time": 1}
    return Table("method", columns, doubted())


@evidence
def students():
    columns = {"KL, digits": 3, "KL, glued": 3, "disagreement, digits": 2, "disagreement, glued": 2, "noise, knowledge": 2}
    rows = {row: records for row, records in doubted().items() if "KL, digits" in records[0]}
    return Table("network", columns, {"the ensemble itself": doubted()["ensemble of 5"]} | rows)


# Other 3: robustness. A generative classifier explains an image (n, 784) once for each class, (n, 10, 784), and chooses the
# class whose explanation is closest: that of an autoencoder, of principal components, or the nearest training image.

CODE, WIDTH, AUTOENCODER_STEPS = 8, 48, 800  # ten autoencoders together as large as the MLP; chosen on the choice split
COMPONENTS, NEIGHBOURS = 20, 5000
MLP_STEPS, MLP_RATE = 1000, 4e-3
RADII = {"L2": (0.5, 1, 1.5, 2, 3), "L∞": (0.05, 0.1, 0.2, 0.3)}


def train_autoencoders(images, labels, seed, steps=AUTOENCODER_STEPS):
    models = []
    for digit in range(10):
        torch.manual_seed(10 * seed + digit)
        mine = images[labels == digit]
        models.append(ae.AutoEncoder(784, CODE, depth=2, width=WIDTH))
        loader = ae.make_loader(mine, mine, sampler=RandomSampler(mine, num_samples=50 * steps))
        ae.train_pass(models[-1], torch.optim.Adam(models[-1].parameters(), lr=3e-3, fused=True), loader)
        models[-1].eval().requires_grad_(False)
    return lambda x, shown=None: torch.stack([model(part) for model, part in zip(models, for_each_class(x))], dim=1)


def for_each_class(x):
    """Images (n, 784), the same for each class, or (n, 10, 784) → ten batches."""
    return (x if x.ndim == 3 else x[:, None].expand(-1, 10, -1)).unbind(1)


def fit_pca(images, labels):
    """The linear counterpart: the leading principal components of each class, as many as its images allow."""
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    bases = torch.zeros(10, 784, COMPONENTS)
    for digit in range(10):
        basis = torch.linalg.svd(images[labels == digit] - means[digit], full_matrices=False)[2]
        count = min(COMPONENTS, (labels == digit).sum() - 1)
        bases[digit, :, :count] = basis[:count].T

    def explain(x, shown=None):
        away = torch.stack(for_each_class(x)) - means[:, None]
        return (means[:, None] + away @ bases @ bases.mT).transpose(0, 1)
    return explain


def fit_neighbours(images, labels):
    """The nearest training image of each class, by the pixels `shown` (n, 784) if not by all."""
    parts = [images[labels == digit] for digit in range(10)]

    @torch.no_grad()  # the nearest image is constant around almost any image: the gradient of its distance stays exact
    def explain(x, shown=None):
        nearest = []
        for part, mine in zip(parts, for_each_class(x)):
            weight = torch.ones_like(mine) if shown is None else shown
            nearest.append(part[(weight @ part.square().T - 2 * (weight * mine) @ part.T).argmin(1)])
        return torch.stack(nearest, dim=1)
    return explain


def train_mlp(images, labels, seed, steps=MLP_STEPS, batch=200, masked=False):
    """784-640-416-10 by cross-entropy; `masked` hides a random share of pixels, another for each image."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 640), nn.SiLU(), nn.Linear(640, 416), nn.SiLU(), nn.Linear(416, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=MLP_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    order, mean = torch.cat([torch.randperm(len(images)) for _ in range(-(-steps * batch // len(images)))]), images.mean(0)
    for index in order.split(batch)[:steps]:
        x = images[index]
        if masked:
            x = torch.where(torch.rand_like(x) < torch.rand(len(x), 1) * 0.9, mean, x)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels[index]).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def score_by(explain):
    """Images → scores (n, 10): minus the squared error of each class's explanation."""
    return lambda x: -(explain(x) - x[:, None]).square().sum(2)


@torch.no_grad()
def accuracy(score, x, labels):
    return (torch.cat([score(part) for part in x.split(1000)]).argmax(1) == labels).float().mean().item()


def margin(score, x, labels):
    """How far the best wrong class is ahead of the true one: unlike cross-entropy, it never saturates."""
    scores, true = score(x), F.one_hot(labels, 10).bool()
    return scores.masked_fill(true, -torch.inf).amax(1) - scores[true]


def project(x, origin, radius, norm):
    """Into the ball of `radius` (n, 1) around `origin`, then into the range of pixels."""
    move = x - origin
    if norm == "L2":
        move = move * (radius / move.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    return (origin + torch.minimum(torch.maximum(move, -radius), radius)).clamp(0, 1)


def attack(score, x, labels, radius, norm, seed, steps=40, stop=True):
    """Projected gradient ascent on the margin from a random start, to `stop` when an image is misclassified or to go on.

    Returns the images it ends at, and which were right throughout.
    """
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=random) if norm == "L2" else torch.rand(x.shape, generator=random) * 2 - 1
    length = noise.norm(dim=1, keepdim=True) / torch.rand(len(x), 1, generator=random) if norm == "L2" else 1
    images = project(x + radius * noise / length, x, radius, norm)
    withstood, left = torch.ones(len(x), dtype=torch.bool), torch.arange(len(x))
    for step in range(steps + 1):
        here = images[left].requires_grad_()
        ahead = margin(score, here, labels[left])
        withstood[left] &= ahead.detach() < 0
        if step == steps or not len(left):
            break
        slope, = torch.autograd.grad(ahead.sum(), here)
        slope = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12) if norm == "L2" else slope.sign()
        images[left] = project(here.detach() + 2.5 / steps * radius[left] * slope, x[left], radius[left], norm)
        if stop:
            left = left[withstood[left]]
    return images, withstood


@torch.no_grad()
def search_at_random(score, x, labels, radius, seed, queries=300):
    """An attack without gradients: random coarse moves, then finer ones, kept where they help; which stayed right."""
    random = torch.Generator().manual_seed(seed)
    images, best = x.clone(), margin(score, x, labels)
    for query in range(queries):
        cells = 28 // max(2, round(12 * (1 - query / queries))) + 1
        move = F.interpolate(torch.randn(len(x), 1, cells, cells, generator=random), size=(28, 28)).flatten(1)
        move = move * (torch.rand(move.shape, generator=random) < 0.5)
        tried = project(images + radius / 2 * move / move.norm(dim=1, keepdim=True), x, radius, "L2")
        ahead = margin(score, tried, labels)
        images, best = torch.where((ahead > best)[:, None], tried, images), torch.maximum(ahead, best)
    return best < 0


def withstand(classifiers, x, labels, seed):
    """The share of images left right by attacks at each radius; and, at L2 1.5, by other attacks than the plain one."""
    table, around = {}, torch.full((50, 1), 1.5)
    few, truth = x[:50], labels[:50]
    nearest = fit_neighbours(*splits().train)(few)
    lines = [project(nearest[range(50), (truth + i) % 10], few, around, "L2") for i in range(1, 10)]
    crafted = {name: attack(score, few, truth, around, "L2", seed, stop=False) for name, score in classifiers.items()}
    for name, score in classifiers.items():
        row = table[name] = {}
        for norm, radii in RADII.items():
            many, radius = len(radii), torch.tensor(radii).repeat_interleave(len(x))[:, None]  # all radii at once
            right = attack(score, x.repeat(many, 1), labels.repeat(many), radius, norm, seed)[1].view(many, -1)
            row |= {f"{norm} {r}": 100 * share for r, share in zip(radii, right.float().mean(1).tolist())}
        kept = lambda images: margin(score, images, truth) < 0
        tries = {"white-box": crafted[name][1], "160 steps": attack(score, few, truth, around, "L2", seed, steps=160)[1],
                 "4 restarts": torch.stack([attack(score, few, truth, around, "L2", seed + 100 * i)[1] for i in range(1, 5)]).all(0),
                 "transferred": torch.stack([kept(images) for other, (images, _) in crafted.items() if other != name]).all(0),
                 "no gradient": torch.stack([*map(kept, lines), search_at_random(score, few, truth, around, seed)]).all(0)}
        tries |= {"all together": torch.stack(list(tries.values())).all(0),
                  "white-box, L2 10": attack(score, few, truth, around * 0 + 10, "L2", seed)[1]}
        row |= {title: 100 * right.float().mean().item() for title, right in tries.items()}
        row["digits"] = ae.to_strip(crafted[name][0])
    return table, ae.to_strip(few)


@torch.no_grad()
def score_shown(explain, x, shown, filling, rounds=20):
    """Scores by the pixels `shown` (n, 784) only; each class refills the others from its own explanation, `rounds` times."""
    shown, x, explanation = shown[:, None], x[:, None], filling
    for _ in range(1 + rounds):
        explanation = explain((shown * x + (1 - shown) * explanation).expand(-1, 10, -1), shown[:, 0])
    return -(shown * (explanation - x)).square().sum(2)


def strokes(count, random):
    """Thin straight bars, upright or lying."""
    place, begin, length = (torch.randint(low, high, (count, 1), generator=random) for low, high in ((6, 22), (4, 12), (8, 14)))
    along, across = torch.arange(28).repeat(28), torch.arange(28).repeat_interleave(28)
    bars = ((across == place) & (along >= begin) & (along < begin + length)).float().view(count, 28, 28)
    return torch.where(torch.rand(count, 1, 1, generator=random) < 0.5, bars, bars.mT).flatten(1)


def zip_bits(images):
    return torch.tensor([8.0 * len(zlib.compress(row.tobytes(), 9)) for row in (images * 255).round().byte().numpy()])


def withstood(seed):
    """All of Other 3 with one seed: table → row → record."""
    (images, labels), (x, truth) = splits().train, (part[:5000] for part in splits().test)
    random = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(x), generator=random)[:1000]
    some, true, mean = x[picked], truth[picked], images.mean(0)
    near = slice(NEIGHBOURS * seed, NEIGHBOURS * (seed + 1))
    explainers = {"autoencoders": train_autoencoders(images, labels, seed), "PCA": fit_pca(images, labels),
                  "1-NN": fit_neighbours(images[near], labels[near])}
    mlps = {"MLP": train_mlp(images, labels, seed), "MLP, trained with masks": train_mlp(images, labels, seed, masked=True)}
    classifiers = {name: score_by(explain) for name, explain in explainers.items()} | {"MLP": mlps["MLP"]}
    attacks, untouched = withstand(classifiers, some[:200], true[:200], seed)
    conditions = {name: {"all data": 100 * accuracy(score, x, truth)} for name, score in (classifiers | mlps).items()}
    for name in attacks:
        attacks[name]["none"] = conditions[name]["all data"]

    order = torch.randperm(len(images), generator=random)
    for count in (2, 10, 50, 500):  # as many images in each training, with repetition, for the ten autoencoders and the MLP
        part = torch.cat([order[labels[order] == digit][:count] for digit in range(10)])
        part = images[part], labels[part]
        for name, score in (("autoencoders", score_by(train_autoencoders(*part, seed, 100))), ("PCA", score_by(fit_pca(*part))),
                            ("1-NN", score_by(fit_neighbours(*part))), ("MLP", train_mlp(*part, seed, 100, 500))):
            conditions[name][f"{count} a class"] = 100 * accuracy(score, x[:2000], truth[:2000])

    halves = torch.ones(4, 28, 28)
    halves[0, :14], halves[1, 14:], halves[2, :, :14], halves[3, :, 14:] = 0, 0, 0, 0
    for title, shown in (("half hidden, at random", (torch.rand(500, 784, generator=random) >= 0.5).float()),
                         ("3/4 hidden", (torch.rand(500, 784, generator=random) >= 0.75).float()),
                         ("half hidden, a block", halves.flatten(1)[torch.randint(4, (500,), generator=random)])):
        for name in conditions:
            scores = (mlps[name](shown * some[:500] + (1 - shown) * mean) if name in mlps else
                      score_shown(explainers[name], some[:500], shown, mean, rounds=0 if name == "1-NN" else 20))
            conditions[name][title] = 100 * (scores.argmax(1) == true[:500]).float().mean().item()

    mark = lambda x, digit: torch.cat([F.one_hot(digit, 10).float(), x[:, 10:]], dim=1)  # a pixel that tells the class
    part = mark(images[near], labels[near]), labels[near]
    lie = mark(x, (truth + torch.randint(1, 10, (len(truth),), generator=random)) % 10)
    for name, score in (("autoencoders", score_by(train_autoencoders(*part, seed, 200))), ("PCA", score_by(fit_pca(*part))),
                        ("1-NN", score_by(fit_neighbours(*part))), ("MLP", train_mlp(*part, seed, 400))):
        conditions[name]["shortcut that lies"] = 100 * accuracy(score, lie, truth)

    with torch.no_grad():
        error = lambda x: -classifiers["autoencoders"](x).amax(1)
        variance = error(splits().choice[0][:1000]).mean() / 784  # of a Gaussian pixel: the error as a code length in bits
        doubts = {"MLP, 1 − highest softmax": lambda x: 1 - mlps["MLP"](x).double().softmax(1).amax(1),
                  **{f"{name}, error": lambda x, name=name: -classifiers[name](x).amax(1) for name in explainers},
                  "autoencoders, bits − zlib's bits": lambda x: error(x) / (2 * variance * math.log(2)) - zip_bits(x)}
        kinds = {"black": torch.zeros(1, 784), "grey": torch.full((1, 784), 0.5), "white": torch.ones(1, 784),
                 "noise": torch.rand(1000, 784, generator=random), "bars": strokes(1000, random), "glued": glue(some, true)}
        novelty = {name: {kind: auroc(doubt(novel), doubt(some)) for kind, novel in kinds.items()} for name, doubt in doubts.items()}
    return {"attacks": attacks, "conditions": conditions, "novelty": novelty, "untouched": untouched}


@cache
def experiments():
    """Those of Other 1 and Other 3, the longest first, in one go: no core waits for another."""
    jobs = [(function, seed) for function in (withstood, doubt) for seed in SEEDS]
    return dict(zip(jobs, in_parallel(call, jobs)))


def call(function, seed):
    return function(seed)


def robustness_table(name, first, columns):
    by_seed = [experiments()[withstood, seed][name] for seed in SEEDS]
    return Table(first, columns, {row: [tables[row] for tables in by_seed] for row in by_seed[0]})


@evidence
def attacks():
    table = robustness_table("attacks", "right, % of 200", {"none": 1} | {f"{norm} {r}": 0 for norm in RADII for r in RADII[norm]})
    sheet = [{"label": "digits", "digits": experiments()[withstood, SEEDS[0]]["untouched"]}]
    return table._replace(sheet=sheet + [{"label": label, "digits": records[0]["digits"]}
                                         for label, records in zip(("AEs", "PCA", "1-NN", "MLP"), table.rows.values())])


@evidence
def checks():
    return robustness_table("attacks", "right, % of 50, at L2 1.5", {title: 0 for title in (
        "white-box", "160 steps", "4 restarts", "transferred", "no gradient", "all together", "white-box, L2 10")})


@evidence
def conditions():
    return robustness_table("conditions", "right, %", {title: 1 for title in (
        "all data", "2 a class", "10 a class", "50 a class", "500 a class", "half hidden, at random", "3/4 hidden",
        "half hidden, a block", "shortcut that lies")})


@evidence
def novelty():
    return robustness_table("novelty", "score", {kind: 2 for kind in ("black", "grey", "white", "noise", "bars", "glued")})


@needs_mnist
def test_answer_uncertainty(measured):
    one, longer, five, masks = "one network", "one network, trained longer", "ensemble of 5", f"MC dropout, {MASKS} masks"
    student, mean = "distilled Dirichlet, augmented inputs", "distilled mean, augmented inputs"
    nll, glued, noise = ({row: values for (row, c), values in measured.items() if c == column} for column in ("NLL", "glued", "noise"))
    assert (measured[one, "ECE"] < measured["one network, as it is", "ECE"] / 1.5).all()
    assert (measured[one, "ECE, turned"] > 5 * measured[one, "ECE"]).all()
    assert (nll[five] < nll[student]).all() and (nll[student] < nll[one]).all() and (nll[masks] > nll[one]).all()
    assert 0.3 < (nll[one] - nll[student]).mean() / (nll[one] - nll[five]).mean() < 0.75
    assert abs(nll[student] - nll[longer]).mean() < 0.006 and abs(nll[student] - nll[mean]).mean() < 0.003
    assert (measured[five, "NLL, turned"] < measured[one, "NLL, turned"]).all()
    assert (glued[five] > glued[student]).all() and (glued[student] > glued[longer]).all()
    assert abs(glued[longer] - glued[one]).mean() < 0.006 and noise[student].mean() < noise[mean].mean()


@needs_mnist
def test_answer_students(measured):
    student, mean, clean = (f"distilled {name} inputs" for name in ("Dirichlet, augmented", "mean, augmented", "Dirichlet, clean"))
    longer = "one network, trained longer"
    for kind in ("digits", "glued"):
        divergence, order = ({row: values for (row, c), values in measured.items() if c == f"{column}, {kind}"}
                             for column in ("KL", "disagreement"))
        assert (divergence[longer] > 1.2 * divergence[student]).all() and (divergence[clean] > 2 * divergence[student]).all()
        assert (order[student] > order[clean]).all() and (order[mean] > order[student]).all()
        assert (order[longer] > order[student] - 0.03).all()


@needs_mnist
def test_answer_attacks(measured):
    for column in ("L2 1", "L2 1.5", "L∞ 0.05", "L∞ 0.1"):
        assert (measured["autoencoders", column] > measured["MLP", column] + 10).all()
    for control, columns in (("PCA", ("L2 1.5", "L2 2", "L∞ 0.1")), ("1-NN", ("L2 2", "L∞ 0.1"))):
        for column in columns:
            assert (measured[control, column] > measured["autoencoders", column]).all()
    clean = [measured[name, "none"].mean() for name in ("MLP", "autoencoders", "PCA", "1-NN")]
    assert clean == sorted(clean, reverse=True)


@needs_mnist
def test_answer_checks(measured):
    for name in ("autoencoders", "PCA", "1-NN", "MLP"):
        value = {column: measured[name, column].mean() for row, column in measured if row == name}
        assert value["white-box"] - value["160 steps"] < 3 and value["white-box"] - value["4 restarts"] < 6
        assert value["transferred"] > value["white-box"] + 15 and value["no gradient"] > value["white-box"] + 15
        assert value["white-box"] - value["all together"] < 6 and value["white-box, L2 10"] == 0


@needs_mnist
def test_answer_conditions(measured):
    mean = {key: values.mean() for key, values in measured.items()}
    for few in ("2 a class", "10 a class", "50 a class"):
        assert all(mean["PCA", few] > mean[name, few] + 2 for name in ("autoencoders", "1-NN", "MLP"))
        assert abs(mean["autoencoders", few] - mean["MLP", few]) < 6
    masked, blocked = "MLP, trained with masks", "half hidden, a block"
    assert mean["MLP", "half hidden, at random"] < 70 < 90 < mean["autoencoders", "half hidden, at random"]
    assert abs(mean[masked, "half hidden, at random"] - mean["autoencoders", "half hidden, at random"]) < 4
    assert (measured["autoencoders", blocked] > measured[masked, blocked]).all()
    assert all((measured[name, "shortcut that lies"] > measured["MLP", "shortcut that lies"] + 10).all()
               for name in ("autoencoders", "PCA", "1-NN"))


@needs_mnist
def test_answer_novelty(measured):
    errors, softmax, bits = "autoencoders, error", "MLP, 1 − highest softmax", "autoencoders, bits − zlib's bits"
    assert measured[errors, "black"].max() < 0.1 and measured[errors, "bars"].max() < 0.5
    assert measured[softmax, "black"].min() > 0.95 and measured[softmax, "bars"].min() > 0.9
    assert (measured[errors, "glued"] > measured[softmax, "glued"]).all()
    assert measured[bits, "black"].min() > 0.9 and measured[bits, "bars"].min() > 0.9 and measured[bits, "noise"].max() < 0.1


def test_dirichlet_loss_is_the_divergence_and_its_read_out_what_samples_say():
    torch.manual_seed(0)
    z, log_p = torch.randn(2, 6, 10).double(), torch.randn(6, MEMBERS, 10).double().log_softmax(-1)
    mean = log_p.exp().mean(1)
    spread = (mean[:, None] * (mean.log()[:, None] - log_p)).sum(-1).mean(1)
    precision = ((MEMBERS - 1) / MEMBERS * 9 / 2 / spread)[:, None]
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(z.exp() + 1), torch.distributions.Dirichlet(precision * mean + 1)) / precision[:, 0]
    losses = torch.stack([dirichlet_loss(each[None], log_p) for each in z])
    assert (losses[0] - losses[1]).item() == pytest.approx((divergence[0] - divergence[1]).mean().item())
    net = [*(torch.zeros(1, *shape) for shape in ((784, 200), (1, 200), (200, 200), (1, 200), (200, 10))), z[:1, :1].float()]
    log_p, knowledge = dirichlet(net, torch.rand(1, 784))
    samples = torch.distributions.Dirichlet(z[0, 0].exp() + 1).sample((200_000,))
    assert torch.allclose(log_p[0].double(), z[0, 0].log_softmax(-1), atol=1e-5)
    assert knowledge.item() == pytest.approx((entropy(samples.mean(0).log()) - entropy(samples.log()).mean()).item(), rel=0.01)


def test_attack_goes_as_far_as_geometry_allows():
    torch.manual_seed(0)
    weights, x = torch.randn(784, 10), torch.full((50, 784), 0.5)  # so far inside the range that only the radius binds
    score = lambda x: x @ weights + torch.arange(10.0)
    x = x + 0.01 * torch.randn_like(x)
    scores, labels = score(x), score(x).argmax(1)
    between = (weights.T[labels][:, None] - weights.T[None]).transpose(1, 2)  # (50, 784, 10)
    for norm, dual in (("L2", 2), ("L∞", 1)):
        gaps = (scores.amax(1, keepdim=True) - scores) / between.norm(p=dual, dim=1)
        distance = gaps.masked_fill(F.one_hot(labels, 10).bool(), torch.inf).amin(1, keepdim=True)
        assert attack(score, x, labels, 0.98 * distance, norm, 0)[1].all()
        images, right = attack(score, x, labels, 1.1 * distance, norm, 0, stop=False)
        assert right.float().mean() < 0.1
        assert ((images - x).norm(p=2 if norm == "L2" else torch.inf, dim=1) <= 1.1001 * distance[:, 0]).all()


def test_scores_of_doubt_have_their_known_values():
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    log_p = torch.tensor([[0.8, 0.2]] * 10).log()
    assert calibration_error(log_p, torch.tensor([0] * 6 + [1] * 4)) == pytest.approx(0.2)
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)


def test_every_table_of_figures_has_its_test_and_every_test_its_table():
    text = ANSWERS.read_text(encoding="utf-8")
    tests = [name for name in globals() if name.startswith("test_answer_")]
    assert sorted(re.findall(r"<!-- (test_answer_\w+) -->", text)) == sorted(tests) == sorted(EVIDENCE)
    for name in tests:
        assert "measured" in inspect.signature(globals()[name]).parameters and f"`{name}`" in text, name
    assert "±" not in re.sub(r"<!-- test_answer_\w+ -->.*?<!-- end -->", "", text, flags=re.S), "a figure outside the tables"
    for picture in re.findall(r'src="(.*?)"', text):
        assert (HERE / picture).is_file() and f"test_answer_{Path(picture).stem}" in tests


@pytest.mark.parametrize("name", EVIDENCE, ids=lambda name: name.removeprefix("test_answer_"))
def test_a_falsified_figure_is_caught(name):
    honest = figures(written_table(name))
    compare(honest, honest)
    for key, (mean, spread, allowance) in honest.items():
        # what was measured differs: the figure by more than its spread allows, or the spread by far
        for falsified in ((mean + 1.1 * allowance, spread), (mean - 1.1 * allowance, spread), (mean, spread + 1.1 * allowance)):
            if "time" in key[1]:
                falsified = 2.1 * mean, spread
            with pytest.raises(AssertionError, match=re.escape(", ".join(key))):
                compare(honest | {key: (*falsified, allowance)}, honest)
    shortened = dict(list(honest.items())[1:])
    with pytest.raises(AssertionError, match="other rows"):
        compare(shortened, honest)


def test_every_reference_is_cited_and_every_citation_has_one():
    answers, references = ANSWERS.read_text(encoding="utf-8").split("\n## References\n")
    cited = [int(number) for group in re.findall(r"\[(\d[^\]]*)\]", answers) for number in re.findall(r"\b\d+\b", group)]
    numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. ", references)]
    assert list(dict.fromkeys(cited)) == numbers == list(range(1, len(numbers) + 1))  # in the order of their first citation


# ---- The tables in README.md -----------------------------------------------------------------------------------------

def plain_recipe(seed, sizes=(784, 529, 274, 20)):
    """The yardstick: ReLU layers, a loader that transforms image by image, Adam at a constant rate. Returns its error."""
    torch.manual_seed(seed)
    layers = []
    for a, b in zip((*sizes, *sizes[-2::-1]), (*sizes[1:], *sizes[-2::-1])):
        layers += [nn.Linear(a, b), nn.ReLU()]
    layers[2 * len(sizes) - 3], layers[-1] = nn.Identity(), nn.Sigmoid()
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train_loader, test_loader = (
        DataLoader(torchvision.datasets.MNIST(MNIST_FOLDER, train, transform=torchvision.transforms.ToTensor()),
                   batch_size=50, shuffle=True) for train in (True, False))
    for _ in range(10):
        for images, _ in train_loader:
            x = images.view(-1, 784)
            optimizer.zero_grad()
            torch.linalg.vector_norm(model(x) - x, dim=1).sum().backward()
            optimizer.step()
    with torch.no_grad():
        return np.mean([(model(x.view(-1, 784)) - x.view(-1, 784)).square().mean().item() for x, _ in test_loader])


def yardstick(seeds=(0, 1, 2)):
    """The script and the plain recipe in turn, each as a process of its own."""
    recipes = {"`python autoencoder.py`": [HERE / "autoencoder.py", "--data", MNIST_FOLDER, "--seed"],
               "the same without feedback": [HERE / "autoencoder.py", "--data", MNIST_FOLDER, "--feedback", "0", "--seed"],
               "the plain recipe": [HERE / "test_autoencoder.py", "plain"]}
    runs = {name: [] for name in recipes}
    for seed in seeds:
        for name, arguments in recipes.items():
            start = time.perf_counter()
            out = subprocess.run([sys.executable, *arguments, str(seed)], capture_output=True, text=True, check=True).stdout
            runs[name].append({"time": time.perf_counter() - start,
                               "error": float(re.search(r"on the test images: ([\d.]+)", out)[1])})
            print(f"{name}, seed {seed}: {runs[name][-1]}", flush=True)
    mean = lambda name, key: np.mean([run[key] for run in runs[name]])
    ratio = lambda name, key: mean(name, key) / mean("the plain recipe", key)
    span = lambda name: f"{min(run['time'] for run in runs[name]):.0f} to {max(run['time'] for run in runs[name]):.0f}"
    return ["| | squared error per pixel, test | of the plain recipe's | seconds, start to end | of the plain recipe's |",
            "|---|---|---|---|---|"] + [
        f"| {name} | {ae.mean_sd(runs[name], 'error', 5)} | {ratio(name, 'error'):.2f} | {mean(name, 'time'):.0f} ({span(name)}) | "
        f"{ratio(name, 'time'):.2f} |" for name in recipes]


def densities(seeds=(0, 1, 2), epochs=3.0):
    """The choice of the density over codes: Fréchet distances of the default autoencoder's digits to the choice split."""
    splits = ae.Splits(ae.load_data(MNIST_FOLDER))
    reference = ae.Reference(ae.train_features(*splits.features), splits.choice[0], splits.train[0])
    images, labels = splits.train
    one_hot = F.one_hot(labels[:10_000])
    fits = {"one Gaussian": lambda m, codes: ae.fit_density(codes, torch.ones(len(codes), 1)),
            "one per class, with labels": lambda m, codes: ae.fit_density(codes, one_hot),
            **{f"mixture of {k}": lambda m, codes, k=k: ae.fit_generator(m, images, k) for k in (10, 30, 100, 300)}}
    measured = {name: [] for name in fits}
    for seed in seeds:
        model = ae.train_setting(ae.DEFAULT, seed, epochs, images, labels)
        with torch.no_grad():
            codes = model.encode(images[:10_000])
        for name, fit in fits.items():
            measured[name].append(reference.measure(ae.generate(model, fit(model, codes), len(reference.images), seed)))
    rows = {"real images (floor)": [reference.measure(splits.confirmation[0])], **measured, "PCA-Gaussian (ceiling)": [reference.ceiling()]}
    return ["| density | Fréchet | kernel | coverage | nearness |", "|---|---|---|---|---|"] + [
        f"| {name} | {ae.mean_sd(records, 'frechet')} | {ae.mean_sd(records, 'kernel', 4)} | "
        f"{ae.mean_sd(records, 'coverage', 2)} | {ae.mean_sd(records, 'nearness', 2)} |" for name, records in rows.items()]


def measure_one(job):
    """One setting of the search, trained and measured as there, in a process that keeps the data for the next."""
    settings, seed, epochs, split = job
    if not KEPT:
        torch.set_num_threads(1)
        splits = ae.Splits(ae.load_data(MNIST_FOLDER))
        KEPT.extend((splits, ae.train_features(*splits.features)))
    splits, features = KEPT
    return ae.run_trial(settings, seed, epochs, splits, ae.Reference(features, getattr(splits, split)[0], splits.train[0]))


KEPT = []


def halving(pools=(0, 1), trials=27):
    """Successive halving against random search with the same training, both judged on the confirmation split.

    Halving spends 27 / 3 + 9 = 18 epochs; random search spends them on six trainings of three epochs and takes the best on
    the choice split, averaged over all sets of six. The judgement is of other trainings, with a fresh seed.
    """
    rows = ["| pool | halving's choice | random search's | the pool's best | median | rank correlation of 1/3 and 3 epochs | "
            "of error and Fréchet | place of the lowest error |", "|---|---|---|---|---|---|---|---|"]
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        for pool in pools:
            drawn = [ae.draw_settings(trial, pool) for trial in range(1, trials + 1)]
            run = lambda picked, epochs, seed, split: workers.map(
                measure_one, [(drawn[i], seed, epochs, split) for i in picked], chunksize=1)
            short = run(range(trials), 1 / 3, pool, "choice")
            kept = sorted(range(trials), key=lambda i: ae.rank_key(short[i]))[:9]
            chosen = min(zip(kept, run(kept, 1, pool, "choice")), key=lambda pair: ae.rank_key(pair[1]))[0]
            full = run(range(trials), 3, pool + 100, "choice")
            judged = [record["frechet"] for record in run(range(trials), 3, pool + 200, "confirmation")]
            order = sorted(range(trials), key=lambda i: ae.rank_key(full[i]))
            chance = [math.comb(trials - 1 - place, 5) / math.comb(trials, 6) for place in range(trials)]  # best of six
            frechet, error = [r["frechet"] for r in full], [r["mse"] for r in full]
            rows.append(f"| {pool} | {judged[chosen]:.3f} | {sum(c * judged[i] for c, i in zip(chance, order)):.3f} | "
                        f"{min(judged):.3f} | {np.median(judged):.3f} | "
                        f"{rank_correlation([r['frechet'] for r in short], frechet):.2f} | "
                        f"{rank_correlation(error, frechet):.2f} | {order.index(int(np.argmin(error))) + 1} of {trials} |")
    return rows


def workers(epochs=1):
    """The time of a whole search with one worker and with two, a core each."""
    times = []
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, HERE / "autoencoder.py", "search", "--data", MNIST_FOLDER, "--epochs", str(epochs),
                            "--workers", str(count), "--out", folder], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    return ["| one worker, s | two workers, s | ratio |", "|---|---|---|",
            f"| {times[0]:.0f} | {times[1]:.0f} | {times[0] / times[1]:.2f} |"]


def measure(names):
    """Measure the named tables afresh, by default all, and write them into the document that has their marks."""
    tables = {"yardstick": yardstick, "densities": densities, "halving": halving, "workers": workers}
    for name in [each for name in names or [*tables, "answers"] for each in (EVIDENCE if name == "answers" else [name])]:
        start, table = time.perf_counter(), (tables | EVIDENCE)[name]()
        if isinstance(table, Table):
            if table.sheet:
                ae.contact_sheet(table.sheet, HERE / ".github" / f"{name.removeprefix('test_answer_')}.png")
            table = table.lines()
        rows = "\n".join(table)
        print(f"{name}, {time.perf_counter() - start:.0f} s\n{rows}", flush=True)
        for document in (HERE / "README.md", ANSWERS):
            text = document.read_text(encoding="utf-8")
            new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{rows}\n{m[2]}", text, flags=re.S)
            if f"<!-- {name} -->" in text:
                document.write_text(new, encoding="utf-8")
                break
        else:
            raise ValueError(f"neither document has the marks <!-- {name} --> and <!-- end --> to write between")


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        print(f"on the test images: {plain_recipe(int(sys.argv[2])):.5f}")
    else:
        measure(sys.argv[1:])

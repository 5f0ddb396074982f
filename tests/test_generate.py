"""Sampling jobs with labels: what ranks share, what a killed job keeps, and what is refused."""
import json

import numpy as np
import pytest
import torch

from dpi_nbdev.generate import collect_samples, generate_samples

LABELS = [3, 0, 0, 2, 1, 3, 3, 0, 2, 1, 1]
SHAPE = (1, 4, 4)


def by_label(x, streams, y):
    "An image whose grey says its label, and whose first pixel says its noise."
    assert y.dtype == torch.int64 and y.shape == (len(x),) == (len(streams),)
    out = (y / 4 - 1).view(-1, 1, 1, 1) * torch.ones(SHAPE)
    out[:, 0, 0, 0] = x[:, 0, 0, 0].tanh()
    return out


def job(out, labels=LABELS, sample=by_label, **kw):
    kw = dict(batch_size=4, progress=False, labels=labels) | kw
    return generate_samples(sample, len(LABELS), SHAPE, out, **kw)


def collected(out):
    with np.load(collect_samples(out)) as f:
        return dict(f)


def test_each_sample_is_made_with_its_own_label_on_any_number_of_ranks(tmp_path):
    files = []
    for world, size in ((1, 4), (3, 4), (2, 3), (1, 64)):
        out = tmp_path / f"{world}-{size}.npz"
        for rank in reversed(range(world)):
            job(out, rank=rank, world=world, batch_size=size)
        files.append(collected(out))
    for f in files:
        assert f["arr_1"].tolist() == LABELS and f["arr_1"].dtype == np.int64
        grey = ((np.array(LABELS) / 4) * 127.5).astype(np.uint8)
        assert (f["arr_0"][:, 1:, :, 0] == grey[:, None, None]).all()
        assert (f["arr_0"] == files[0]["arr_0"]).all()
    assert len(set(files[0]["arr_0"][:, 0, 0, 0].tolist())) > 5  # noise of its own


def test_labels_leave_the_noise_of_a_job_as_it_is(tmp_path):
    with_labels, without = [], []

    def keep(x, streams, *y):
        (with_labels if y else without).append(x.clone())
        return 0 * x

    job(tmp_path / "a.npz", sample=keep)
    job(tmp_path / "b.npz", labels=None, sample=keep)
    assert torch.equal(torch.cat(with_labels), torch.cat(without))
    assert set(collected(tmp_path / "b.npz")) == {"arr_0"}


def test_an_interrupted_job_goes_on_with_the_same_labels(tmp_path):
    calls = []

    def fragile(x, streams, y):
        calls.append(y.tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return by_label(x, streams, y)

    out = tmp_path / "cut.npz"
    with pytest.raises(KeyboardInterrupt):
        job(out, sample=fragile)
    # A list, a tensor and an array of another type say the same labels.
    job(out, labels=torch.tensor(LABELS, dtype=torch.uint8), sample=fragile)
    assert calls == [LABELS[:4], LABELS[4:8], LABELS[4:8], LABELS[8:]]
    job(tmp_path / "whole.npz", labels=np.array(LABELS, dtype=">i4"))
    cut, whole = collected(out), collected(tmp_path / "whole.npz")
    assert all((cut[k] == whole[k]).all() for k in ("arr_0", "arr_1"))


@pytest.mark.parametrize("begun, then", [
    (LABELS, LABELS[::-1]), (LABELS, None), (None, LABELS)])
def test_a_job_is_not_continued_with_other_labels(tmp_path, begun, then):
    def any_label(x, streams, *y):
        return 0 * x
    out = tmp_path / "s.npz"
    parts = job(out, labels=begun, sample=any_label, rank=0, world=2)
    before = {p.name: p.read_bytes() for p in parts.iterdir()}
    with pytest.raises(ValueError, match=r"holds an unfinished job with other settings \(labels: "):
        job(out, labels=then, sample=any_label)
    assert {p.name: p.read_bytes() for p in parts.iterdir()} == before


def test_a_job_without_labels_has_the_settings_it_had_before(tmp_path):
    parts = job(tmp_path / "s.npz", labels=None, sample=lambda x, streams: x.tanh())
    settings = json.loads((parts / "job.json").read_text(encoding="utf-8"))
    assert set(settings) == {"n", "shape", "seed", "batch_size"}


@pytest.mark.parametrize("labels, error, message", [
    (LABELS[:-1], ValueError, r"one per sample, shape \(11,\); got shape \(10,\)"),
    (3, ValueError, r"got shape \(\)"),
    ([LABELS], ValueError, r"got shape \(1, 11\)"),
    ([0.] * 11, TypeError, "whole numbers, got float64"),
    ([True] * 11, TypeError, "whole numbers, got bool"),
    (torch.zeros(11), TypeError, "whole numbers, got float32"),
    (["cat"] * 11, TypeError, "whole numbers, got <U3"),
    ([0] * 10 + [-2], ValueError, "whole numbers from 0, got -2"),
])
def test_labels_that_do_not_fit_are_refused_before_anything_is_made(tmp_path, labels, error, message):
    with pytest.raises(error, match=message):
        job(tmp_path / "s.npz", labels=labels)
    assert list(tmp_path.iterdir()) == []

"""What an independent implementation answers: torch-fidelity's Inception network and metrics.

The published weights are not in this repository, so the networks are compared on weights made by a formula: whole-number arithmetic,
the same on every machine and in every version of every library. `independent.json` holds the answers of torch-fidelity, of which the
network worked in float64. It is made again, where torch-fidelity is installed, by

    python tests/independent.py
"""
import importlib.metadata
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

ANSWERS = Path(__file__).with_suffix(".json")
SIZES = [(32, 32), (75, 100), (299, 299), (512, 512)]   # rows, columns: enlarged, not square, left as it is, reduced
SHOWN = 48                                              # of each image's 2048 + 2023 + 1008 numbers, evenly spread


def mixed(n, seed):
    "n numbers in [0, 1) by splitmix64 (Steele, Lea and Flood 2014)."
    z = (np.arange(1, n + 1, dtype=np.uint64) + np.uint64(seed * 2**32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def weights(shapes):
    "name -> float32 tensor for the published names and shapes, in their order; variances that keep a signal alive."
    state = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("tracked"):
            state[name] = torch.tensor(7)
            continue
        u = mixed(int(np.prod(shape)), i).reshape(shape)
        if name.endswith(("running_var", "bn.weight")):
            v = 0.5 + u
        else:
            v = (2 * u - 1) * ((6 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2)
        state[name] = torch.from_numpy(v.astype(np.float32))
    return state


def image(rows, columns):
    "(1, 3, rows, columns) bytes: slow waves of whole numbers under noise."
    y, x, c = np.meshgrid(np.arange(rows), np.arange(columns), np.arange(3), indexing="ij")
    wave = np.abs((3 * x + 5 * y * (c + 1)) % 320 - 160)
    noise = np.floor(90 * mixed(rows * columns * 3, 10_000 + rows).reshape(rows, columns, 3)).astype(int)
    return torch.from_numpy((wave + noise).astype(np.uint8)).permute(2, 0, 1)[None].contiguous()


def shown(v):
    "Those of a row's numbers that are stored."
    return v[np.linspace(0, len(v) - 1, SHOWN).round().astype(int)]


def clouds():
    "Features of 300 samples and of 250 real images, (N, 24) float64: correlated, and of different means."
    mix = 2 * mixed(24 * 24, 20_000).reshape(24, 24) - 1
    samples, real = (mixed(n * 24, seed).reshape(n, 24) @ mix for n, seed in ((300, 20_001), (250, 20_002)))
    return torch.from_numpy(1.1 * samples + 0.05), torch.from_numpy(real)


def make():
    "Asks torch-fidelity and writes its answers."
    from test_features import published_shapes
    from torch_fidelity import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    samples, real = clouds()
    numbers = dict(frechet=fid_statistics_to_metric(*map(fid_features_to_statistics, clouds()), False)["frechet_inception_distance"],
                   precision_recall=calculate_precision_recall_full(samples, real, 3), inception_score=list(isc_features_to_metric(10 * samples, splits=3, shuffle=False).values()))
    with tempfile.NamedTemporaryFile(suffix=".pth") as f:
        torch.save(weights(published_shapes()), f.name)
        net = FeatureExtractorInceptionV3("float64", ["2048", "logits_unbiased"], feature_extractor_weights_path=f.name)
    net.feature_extractor_internal_dtype = torch.float64
    net.double()
    inner = {}
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: inner.update(maps=o))
    answers = {}
    for size in SIZES:
        pool, logits = net(image(*size))
        row = dict(pool=pool, spatial=inner["maps"][:, :7].permute(0, 2, 3, 1).flatten(1), logits=logits)
        answers["{}×{}".format(*size)] = {k: [float(f"{x:.8g}") for x in shown(v[0].double())] for k, v in row.items()}
    about = {p: importlib.metadata.version(p) for p in ("torch-fidelity", "torch", "numpy")}
    ANSWERS.write_text(json.dumps(dict(made_with=about, metrics=numbers, answers=answers), ensure_ascii=False).replace("], ", "],\n").replace("}, ", "},\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    make()

"""Eq. (2) by the plainest program: a network for each sample, its own state dict."""
import torch
from torch.utils._pytree import tree_leaves


def is_real(v):
    return isinstance(v, torch.Tensor) and v.is_floating_point()


def leaf(x):
    "`x` as a place where gradients end."
    return x.detach().clone().requires_grad_(is_real(x))


def random_sum(y, rows=slice(None), n=None):
    "A random sum of all outputs with a history; weights for `n` samples."
    total = torch.zeros((), dtype=torch.float64)
    for k, v in enumerate(tree_leaves(y)):
        if not (isinstance(v, torch.Tensor) and v.requires_grad):
            continue
        shape = v.shape if n is None else (n, *v.shape[1:])
        draw = torch.Generator().manual_seed(k)
        weights = torch.randn(shape, generator=draw, dtype=torch.float64)[rows]
        total = total + (v.conj() * weights.to(v)).sum().real
    return total


def dense(p):
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


def two_sets(model):
    "Name -> (θ⁰, θ¹), detached copies."
    theta0, theta1 = model.theta()
    copied = lambda p: p.detach().clone()
    return {n: (copied(p), copied(theta1[n])) for n, p in theta0.items()}


def by_hand(nets, sets, lam, call, x, grads=True):
    "Outputs and gradients of one plain network for each sample, or one for the batch."
    outs, total, to_x = [], {}, []
    for i, (net, w) in enumerate(zip(nets, lam.tolist())):
        mixed = {n: (1 - w) * p + w * q for n, (p, q) in sets.items()}
        net.load_state_dict(mixed, strict=False)
        own = {n: net.get_parameter(n) for n in sets}
        for p in own.values():
            p.grad = None
        rows = slice(None) if len(nets) == 1 else slice(i, i + 1)
        own_x = leaf(x[rows])
        with torch.set_grad_enabled(grads):
            y = call(net, own_x * 1, rows)
        outs.append(tree_leaves(y))
        if not grads:
            continue
        random_sum(y, rows, len(x)).backward()
        for n, p in own.items():
            if p.grad is None:
                continue
            for k, factor in enumerate((1 - w, w)):
                total[n, k] = total.get((n, k), 0) + factor * dense(p)
        if own_x.grad is not None:
            to_x.append(own_x.grad)
    is_tensor = lambda v: isinstance(v, torch.Tensor)
    joined = [torch.cat(v) if is_tensor(v[0]) else v[0] for v in zip(*outs)]
    return joined, total | ({"x": torch.cat(to_x)} if to_x else {})


def by_dpi(model, s, call, x, grads=True):
    "The same of a DPI model."
    model.zero_grad()
    own_x = leaf(x)
    with torch.set_grad_enabled(grads):
        y = call(lambda x, *a, **k: model(x, s, *a, **k), own_x * 1, slice(None))
    if not grads:
        return tree_leaves(y), {}
    random_sum(y, n=len(x)).backward()
    found = {(n, k): dense(p) for k, theta in enumerate(model.theta())
             for n, p in theta.items() if p.grad is not None}
    return tree_leaves(y), found | ({} if own_x.grad is None else {"x": own_x.grad})


def largest(got, want):
    "The largest error of outputs and gradients, relative to the size of each."
    (y, to), (y_want, to_want) = got, want
    assert len(y) == len(y_want)
    worst, both = 0., [(a, b, 1e-6) for a, b in zip(y, y_want)]
    sizes = [v.abs().max().item() for v in to_want.values() if v.numel()]
    floor = max([*sizes, 1e-4]) / 100
    for k in to.keys() | to_want.keys():
        a, b = to.get(k), to_want.get(k)
        zero = torch.zeros_like(b if a is None else a)
        both.append((zero if a is None else a, zero if b is None else b, floor))
    for a, b, least in both:
        if not isinstance(b, torch.Tensor):
            assert a == b
            continue
        assert a.shape == b.shape
        if not b.numel():
            continue
        if not (b.is_floating_point() or b.is_complex()):
            assert torch.equal(a, b)
            continue
        off = (a - b).detach().abs().max().item()
        worst = max(worst, off / max(b.detach().abs().max().item(), least))
    return worst

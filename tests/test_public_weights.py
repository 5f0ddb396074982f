"""Files in the public formats of DRUNet and ADM: names, shapes and computation, written here from the published rules alone, against the classes."""
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F

from dpi_nbdev.adm import ADM
from dpi_nbdev.dpi import DPI
from dpi_nbdev.drunet import DRUNet

# ---------------------------------------------------------------- DRUNet


def drunet_keys(i, o, widths, n):
    "name -> shape of a DRUNet checkpoint."
    shapes, L = {"m_head.weight": (widths[0], i, 3, 3)}, len(widths)

    def blocks(part, c, first):
        for j in range(first, first + n):
            for r in (0, 2):
                shapes[f"{part}.{j}.res.{r}.weight"] = (c, c, 3, 3)
    for k in range(1, L):
        blocks(f"m_down{k}", widths[k - 1], 0)
        shapes[f"m_down{k}.{n}.weight"] = (widths[k], widths[k - 1], 2, 2)
    blocks("m_body", widths[-1], 0)
    for k in range(L - 1, 0, -1):
        shapes[f"m_up{k}.0.weight"] = (widths[k], widths[k - 1], 2, 2)  # transposed: (in, out, 2, 2)
        blocks(f"m_up{k}", widths[k - 1], 1)
    shapes["m_tail.weight"] = (o, widths[0], 3, 3)
    return shapes


def drunet_reference(w, x):
    "The output of the network whose weights are `w`, from the names alone."
    def run(part, h):
        j = 0
        while True:
            if f"{part}.{j}.res.0.weight" in w:
                h = h + F.conv2d(F.conv2d(h, w[f"{part}.{j}.res.0.weight"], padding=1).relu(), w[f"{part}.{j}.res.2.weight"], padding=1)
            elif f"{part}.{j}.weight" in w:
                h = (F.conv_transpose2d if "up" in part else F.conv2d)(h, w[f"{part}.{j}.weight"], stride=2)
            else:
                return h
            j += 1
    levels = sum(k.startswith("m_up") and k.count(".") == 2 for k in w)  # m_up3.0.weight, …
    hs = [F.conv2d(x, w["m_head.weight"], padding=1)]
    for k in range(1, levels + 1):
        hs.append(run(f"m_down{k}", hs[-1]))
    h = run("m_body", hs[-1])
    for k in range(levels, 0, -1):
        h = run(f"m_up{k}", h + hs[k])
    return F.conv2d(h + hs[0], w["m_tail.weight"], padding=1)


# ---------------------------------------------------------------- ADM


def adm_keys(i, o, width, mult, n, attention=(), classes=None, updown=True, emb=True, scale_shift=True):
    "name -> shape of an ADM checkpoint; `attention` holds levels, 0 being the full resolution."
    shapes, d, c = {}, 4 * width, [int(width * m) for m in mult]

    def put(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(at, a, b):
        put(f"{at}.in_layers.0", a)
        put(f"{at}.in_layers.2", b, a, 3, 3)
        if emb:
            put(f"{at}.emb_layers.1", b * (2 if scale_shift else 1), d)
        put(f"{at}.out_layers.0", b)
        put(f"{at}.out_layers.3", b, b, 3, 3)
        if a != b:
            put(f"{at}.skip_connection", b, a, 1, 1)

    def attend(at, a):
        put(f"{at}.norm", a)
        put(f"{at}.qkv", 3 * a, a, 1)
        put(f"{at}.proj_out", a, a, 1)

    if emb:
        put("time_embed.0", d, width)
        put("time_embed.2", d, d)
    if classes:
        shapes["label_emb.weight"] = (classes, d)
    put("input_blocks.0.0", c[0], i, 3, 3)
    ch, skips = c[0], [c[0]]
    for level, w in enumerate(c):
        for _ in range(n):
            at = f"input_blocks.{len(skips)}"
            residual(f"{at}.0", ch, w)
            if level in attention:
                attend(f"{at}.1", w)
            ch = w
            skips.append(ch)
        if level + 1 < len(c):
            at = f"input_blocks.{len(skips)}.0"
            residual(at, ch, ch) if updown else put(f"{at}.op", ch, ch, 3, 3)
            skips.append(ch)
    residual("middle_block.0", ch, ch)
    attend("middle_block.1", ch)
    residual("middle_block.2", ch, ch)
    j = 0
    for level in reversed(range(len(c))):
        for r in range(n + 1):
            at, inner = f"output_blocks.{j}", 1
            residual(f"{at}.0", ch + skips.pop(), c[level])
            ch = c[level]
            if level in attention:
                attend(f"{at}.1", ch)
                inner = 2
            if level > 0 and r == n:
                residual(f"{at}.{inner}", ch, ch) if updown else put(f"{at}.{inner}.conv", ch, ch, 3, 3)
            j += 1
    put("out.0", ch)
    put("out.2", o, ch, 3, 3)
    return shapes


def adm_reference(w, x, t=None, y=None, *, head_channels, new_order):
    "The output of the network whose weights are `w`, from the names alone; attention by einsum."
    def norm(at, h):  # 32 groups, by hand
        g = h.reshape(len(h), 32, -1)
        g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        per_channel = (1, -1) + (1,) * (h.ndim - 2)
        return g.reshape(h.shape) * w[f"{at}.weight"].view(per_channel) + w[f"{at}.bias"].view(per_channel)

    def conv(at, h, **kw):
        return F.conv2d(h, w[f"{at}.weight"], w[f"{at}.bias"], **kw)

    def silu(h):
        return h * torch.sigmoid(h)

    def half(h):
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    def double(h):
        return h.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def residual(at, h, e, resample):
        a = conv(f"{at}.in_layers.2", resample(silu(norm(f"{at}.in_layers.0", h))), padding=1)
        if f"{at}.emb_layers.1.weight" in w:
            m = silu(e) @ w[f"{at}.emb_layers.1.weight"].T + w[f"{at}.emb_layers.1.bias"]
            if m.shape[1] == 2 * a.shape[1]:
                scale, shift = m[:, :a.shape[1], None, None], m[:, a.shape[1]:, None, None]
                a = norm(f"{at}.out_layers.0", a) * (1 + scale) + shift
            else:
                a = norm(f"{at}.out_layers.0", a + m[:, :, None, None])
        else:
            a = norm(f"{at}.out_layers.0", a)
        skip = resample(h)
        if f"{at}.skip_connection.weight" in w:
            skip = conv(f"{at}.skip_connection", skip)
        return skip + conv(f"{at}.out_layers.3", silu(a), padding=1)

    def attend(at, h):
        B, C, H, W = h.shape
        seq = h.reshape(B, C, H * W)
        qkv = torch.einsum("oc,bcn->bon", w[f"{at}.qkv.weight"][:, :, 0], norm(f"{at}.norm", seq)) + w[f"{at}.qkv.bias"][:, None]
        d, out = head_channels, []
        for head in range(C // d):
            start = [k * C + head * d for k in range(3)] if new_order else [head * 3 * d + k * d for k in range(3)]
            q, k, v = (qkv[:, s:s + d] for s in start)
            share = torch.softmax(torch.einsum("bdn,bdm->bnm", q, k) / math.sqrt(d), -1)
            out.append(torch.einsum("bnm,bdm->bdn", share, v))
        h2 = torch.einsum("oc,bcn->bon", w[f"{at}.proj_out.weight"][:, :, 0], torch.cat(out, 1)) + w[f"{at}.proj_out.bias"][:, None]
        return (seq + h2).reshape(h.shape)

    def stage(at, h, e, coarser):
        "The layers at.0, at.1, …; `coarser`: a lone residual block here halves the resolution."
        j = 0
        while True:
            p = f"{at}.{j}"
            if f"{p}.weight" in w:
                h = conv(p, h, padding=1)
            elif f"{p}.op.weight" in w:
                h = conv(f"{p}.op", h, padding=1, stride=2)
            elif f"{p}.conv.weight" in w:
                h = conv(f"{p}.conv", double(h), padding=1)
            elif f"{p}.qkv.weight" in w:
                h = attend(p, h)
            elif f"{p}.in_layers.0.weight" in w:
                up = at.startswith("output") and j > 0
                h = residual(p, h, e, half if coarser else double if up else (lambda a: a))
            else:
                return h
            j += 1

    e = None
    if t is not None:
        width = w["time_embed.0.weight"].shape[1]
        omega = torch.tensor([10_000 ** (-i / (width // 2)) for i in range(width // 2)], dtype=x.dtype)
        angle = t.to(x.dtype)[:, None] * omega
        e = torch.cat([angle.cos(), angle.sin()], 1) @ w["time_embed.0.weight"].T + w["time_embed.0.bias"]
        e = silu(e) @ w["time_embed.2.weight"].T + w["time_embed.2.bias"]
        if y is not None:
            e = e + w["label_emb.weight"][y]
    ins = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("input_blocks"))
    outs = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("output_blocks"))
    closes = [j for j in range(outs) if any(f"output_blocks.{j}.{i}.{p}.weight" in w for i in (1, 2) for p in ("conv", "in_layers.0"))]
    n = closes[0] if closes else outs - 1
    h, skips = x, []
    for i in range(ins):
        h = stage(f"input_blocks.{i}", h, e, coarser=i > 0 and i % (n + 1) == 0)  # after n blocks of a level
        skips.append(h)
    h = stage("middle_block", h, e, False)
    for j in range(outs):
        h = stage(f"output_blocks.{j}", torch.cat([h, skips.pop()], 1), e, False)
    return conv("out.2", silu(norm("out.0", h)), padding=1)


# ---------------------------------------------------------------- shared


def weights(shapes, seed=0, scale=None):
    "Random values for the names and shapes of a checkpoint: gains around 1, the rest small enough to stay finite."
    g, out = torch.Generator().manual_seed(seed), {}
    for k, v in shapes.items():
        fan = math.prod(v[1:]) or 1
        z = torch.randn(v, generator=g)
        gain = k.endswith("weight") and len(v) == 1
        out[k] = 1 + 0.2 * z if gain else z * (fan ** -0.5 if len(v) > 1 else 0.2)
    return out


def empty_file(path, shapes):
    "A checkpoint of full size on paper: every tensor is one zero, seen in the right shape, so that the file is small."
    torch.save({k: torch.zeros(1).expand(v) for k, v in shapes.items()}, path)
    return path


def wide(w):
    return {k: v.double() for k, v in w.items()}


DRUNETS = {
    "small": (2, 3, (4, 6, 8), 2),
    "five levels": (1, 1, (4, 4, 6, 4, 4), 1),
    "one level": (3, 2, (5,), 3),
    "equal widths": (1, 4, (4, 4), 4),
}
ADMS = {  # arguments of adm_keys
    "no embedding": dict(i=1, o=1, width=32, mult=(1, 2), n=1, attention=(1,), emb=False),
    "scale and shift": dict(i=3, o=3, width=32, mult=(1, 2), n=1, attention=(1,)),
    "sum": dict(i=1, o=1, width=32, mult=(1, 1), n=2, attention=(0,), scale_shift=False),
    "classes, learned sigma": dict(i=3, o=6, width=32, mult=(1, 2, 3), n=2, attention=(1, 2), classes=10),
    "plain resampling": dict(i=1, o=1, width=32, mult=(2, 1, 1), n=1, attention=(2,), updown=False),
    "plain, no embedding": dict(i=2, o=1, width=32, mult=(1, 2), n=3, attention=(), updown=False, emb=False),
    "half multiplier": dict(i=1, o=1, width=64, mult=(0.5, 1), n=1, attention=(1,)),
    "one level": dict(i=1, o=2, width=32, mult=(2,), n=2, attention=(0,), classes=3),
}


@pytest.mark.parametrize("name", DRUNETS)
def test_drunet_loads_and_computes(name, tmp_path):
    i, o, widths, n = DRUNETS[name]
    w = weights(drunet_keys(i, o, widths, n))
    torch.save(w, tmp_path / "net.pth")
    net = DRUNet.from_public(tmp_path / "net.pth")
    assert (net.in_channels, net.out_channels, net.widths, net.n_blocks) == (i, o, widths, n)
    assert not net.training and all(torch.equal(v, w[k]) for k, v in net.state_dict().items()) and list(net.state_dict()) == list(w)
    assert all(p.requires_grad for p in net.parameters())
    x = torch.randn(2, i, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net.double()(x), drunet_reference(wide(w), x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("name", ADMS)
def test_adm_loads_and_computes(name, new_order, tmp_path):
    a = ADMS[name]
    w = weights(adm_keys(**a))
    torch.save(w, tmp_path / "net.pt")
    net = ADM.from_public(tmp_path / "net.pt", image_size=8, head_channels=16, new_attention_order=new_order)
    found = dict(in_channels=a["i"], out_channels=a["o"], width=a["width"], multipliers=a["mult"], n_blocks=a["n"], attention_at=tuple(8 // 2 ** k for k in a["attention"]),
                 embedding=a.get("emb", True), n_classes=a.get("classes"), image_size=8, head_channels=16, new_attention_order=new_order)
    if found["embedding"]:
        found["scale_shift"] = a.get("scale_shift", True)
    else:  # with multiplier 1 first, the base width is the first level's
        found |= dict(width=a["width"] * a["mult"][0], multipliers=tuple(m / a["mult"][0] for m in a["mult"]))
    if len(a["mult"]) > 1:
        found["resblock_updown"] = a.get("updown", True)
    assert {k: getattr(net, k) for k in found} == found
    assert not net.training and list(net.state_dict()) == list(w) and all(torch.equal(v, w[k]) for k, v in net.state_dict().items())
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, a["i"], 8, 16, dtype=torch.float64, generator=g)
    more = ()
    if net.embedding:
        more = (torch.tensor([0., 3.5, 999.], dtype=torch.float64),)
    if net.n_classes:
        more += (torch.tensor([0, 2, 1]),)
    y = net.double()(x, *more)
    assert y.std() > 0.01
    torch.testing.assert_close(y, adm_reference(wide(w), x, *more, head_channels=16, new_order=new_order), rtol=1e-9, atol=1e-9)
    other = adm_reference(wide(w), x, *more, head_channels=16, new_order=not new_order)
    assert (y - other).abs().max() > 1e-6  # the layouts are different networks


def test_the_attention_order_is_asked_for_where_shapes_cannot_tell(tmp_path):
    w = weights(adm_keys(1, 1, 32, (1, 2), 1, (1,), emb=False))
    torch.save(w, tmp_path / "net.pt")
    for heads in (dict(head_channels=32), dict(head_channels=None, n_heads=2)):
        with pytest.raises(ValueError, match="with several heads") as e:
            ADM.from_public(tmp_path / "net.pt", image_size=8, **heads)
        said = str(e.value)
        assert "new_attention_order=True for 64x64_diffusion.pt" in said
        assert "new_attention_order=False for the other published files" in said
        for file in "128x128 256x256 512x512 upsamplers LSUN classifiers".split():
            assert file in said
    one = ADM.from_public(tmp_path / "net.pt", image_size=8).double()  # of 64 channels
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for order in (False, True):
        by_hand = adm_reference(wide(w), x, head_channels=64, new_order=order)
        torch.testing.assert_close(one(x), by_hand, rtol=1e-9, atol=1e-9)


def test_number_of_heads_instead_of_their_width(tmp_path):
    w = weights(adm_keys(1, 1, 32, (1, 2), 1, (1,), emb=False))
    torch.save(w, tmp_path / "net.pt")
    net = ADM.from_public(tmp_path / "net.pt", image_size=8, head_channels=None, n_heads=4, new_attention_order=False).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net(x), adm_reference(wide(w), x, head_channels=16, new_order=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, shapes, n, settings", [
    ("drunet_color", drunet_keys(4, 3, (64, 128, 256, 512), 4), 32_640_960, dict(in_channels=4, n_blocks=4)),
    ("drunet_gray", drunet_keys(2, 1, (64, 128, 256, 512), 4), None, dict(in_channels=2, out_channels=1)),
    ("the paper's", drunet_keys(3, 3, (64, 128, 256, 512), 8), 63_901_056, dict(n_blocks=8)),
    ("the paper's, t map", drunet_keys(4, 3, (64, 128, 256, 512), 8), 63_901_632, dict(n_blocks=8)),
])
def test_drunet_of_public_size(name, shapes, n, settings, tmp_path):
    net = DRUNet.from_public(empty_file(tmp_path / "net.pth", shapes))
    assert {k: getattr(net, k) for k in settings} == settings
    assert n is None or sum(p.numel() for p in net.parameters()) == n
    with torch.device("meta"):
        assert n != 63_901_056 or {k: tuple(v.shape) for k, v in DRUNet().state_dict().items()} == shapes


ADM_PAPER = dict(i=3, o=3, width=128, mult=(1, 2, 3, 4), n=1, attention=(2,))
@pytest.mark.parametrize("name, arguments, n, told, settings", [
    ("64x64_diffusion",
     dict(i=3, o=6, width=192, mult=(1, 2, 3, 4), n=3,
          attention=(1, 2, 3), classes=1000),
     295_904_454, dict(new_attention_order=True),
     dict(width=192, attention_at=(32, 16, 8), n_blocks=3, n_classes=1000, out_channels=6, new_attention_order=True, head_channels=64, resblock_updown=True)),
    ("128x128_diffusion", dict(i=3, o=6, width=256, mult=(1, 1, 2, 3, 4), n=2, attention=(2, 3, 4), classes=1000), None,
     dict(image_size=128, head_channels=None, n_heads=4, new_attention_order=False), dict(attention_at=(32, 16, 8), n_blocks=2, multipliers=(1, 1, 2, 3, 4))),
    ("256x256_diffusion_uncond", dict(i=3, o=6, width=256, mult=(1, 1, 2, 2, 4, 4), n=2, attention=(3, 4, 5)), None, dict(image_size=256, new_attention_order=False),
     dict(attention_at=(32, 16, 8), n_classes=None, width=256)),
    ("512x512_diffusion", dict(i=3, o=6, width=256, mult=(0.5, 1, 1, 2, 2, 4, 4), n=2, attention=(4, 5, 6), classes=1000), None, dict(image_size=512, new_attention_order=False),
     dict(attention_at=(32, 16, 8), multipliers=(0.5, 1, 1, 2, 2, 4, 4), width=256)),
    ("the paper's", dict(**ADM_PAPER, emb=False), 60_867_075,
     dict(new_attention_order=False),
     dict(embedding=False, attention_at=(16,), width=128)),
    ("the paper's, with MLP", ADM_PAPER, 68_156_163,
     dict(new_attention_order=False), dict(embedding=True, scale_shift=True)),
])
def test_adm_of_public_size(name, arguments, n, told, settings, tmp_path):
    net = ADM.from_public(empty_file(tmp_path / "net.pt", adm_keys(**arguments)), **told)
    assert {k: getattr(net, k) for k in settings} == settings
    assert n is None or sum(p.numel() for p in net.parameters()) == n
    if "paper" in name:
        with torch.device("meta"):
            assert {k: tuple(v.shape) for k, v in ADM(embedding="MLP" in name).state_dict().items()} == adm_keys(**arguments)


TWO_HEADS = dict(image_size=8, head_channels=32, new_attention_order=False)
PLAIN = adm_keys(1, 1, 32, (1, 2), 2, (), updown=False, scale_shift=False)
CLASSES = {"drunet": (DRUNet, drunet_keys(1, 1, (4, 6, 8), 2), {}),
           "adm": (ADM, adm_keys(1, 1, 32, (1, 2), 1, (1,), classes=5), TWO_HEADS),
           "adm, plain": (ADM, PLAIN, TWO_HEADS)}


def some(shapes, which):
    "Names to try one by one: all of a DRUNet; of an ADM all that stand outside the blocks, and a quarter of the rest."
    if which == "drunet":
        return list(shapes)
    outside = [k for k in shapes if k.startswith(("time_embed", "label_emb", "input_blocks.0", "out."))]
    return outside + random.Random(0).sample([k for k in shapes if k not in outside], len(shapes) // 4)


@pytest.mark.parametrize("which", CLASSES)
def test_a_missing_tensor_is_named(which, tmp_path):
    cls, shapes, told = CLASSES[which]
    for k in some(shapes, which):
        file = empty_file(tmp_path / "net.pt", {n: v for n, v in shapes.items() if n != k})
        if k == "label_emb.weight":  # without it the file is that of a network without classes
            assert cls.from_public(file, **told).n_classes is None
            continue
        with pytest.raises(ValueError) as e:
            cls.from_public(file, **told)
        assert "in 1 place:" in str(e.value) and f"missing: {k} " in str(e.value), (k, str(e.value))


@pytest.mark.parametrize("which", CLASSES)
def test_a_wrong_shape_is_named(which, tmp_path):
    cls, shapes, told = CLASSES[which]
    for k in some(shapes, which):
        v = shapes[k]
        with pytest.raises(ValueError) as e:
            cls.from_public(empty_file(tmp_path / "net.pt", {**shapes, k: (*v, 7)}), **told)
        assert "in 1 place:" in str(e.value) and f"another shape: {k} is {(*v, 7)}, should be {v}" in str(e.value), (k, str(e.value))


@pytest.mark.parametrize("which", CLASSES)
@pytest.mark.parametrize("seed", range(4))
def test_many_differences_are_all_listed(which, seed, tmp_path):
    cls, shapes, told = CLASSES[which]
    rng = random.Random(seed)
    inner = [k for k in shapes if k.startswith(("m_down", "m_up", "m_body", "input_blocks.1", "middle", "output_blocks.1"))]
    gone, bent = rng.sample(inner, 3), {}
    for k in rng.sample([k for k in inner if k not in gone], 2):
        bent[k] = (*shapes[k], 2)
    extra = {f"{rng.choice(inner)}.{i}": (1,) for i in range(2)}
    file = empty_file(tmp_path / "net.pt", {**{k: v for k, v in shapes.items() if k not in gone}, **bent, **extra})
    with pytest.raises(ValueError) as e:
        cls.from_public(file, **told)
    for says in [f"missing: {k} " for k in gone] + [f"another shape: {k} is" for k in bent] + [f"not part of the network: {k} " for k in extra] + ["in 7 places"]:
        assert says in str(e.value), (says, str(e.value))


class Malicious:
    "A pickle of this runs a command."
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import os
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("cls", [DRUNet, ADM])
def test_files_that_are_no_checkpoints(cls, tmp_path):
    def refused(file, error, says):
        with pytest.raises(error) as e:
            cls.from_public(file)
        assert says in str(e.value) and "\n" not in str(e.value), str(e.value)
    mark, file = tmp_path / "it ran", tmp_path / "net.pt"
    torch.save({"m_head.weight": Malicious(mark)}, file)
    refused(file, ValueError, "is refused: it is a pickle of objects or code")
    file.write_bytes(pickle.dumps({"m_head.weight": Malicious(mark)}, protocol=2))
    refused(file, ValueError, "")
    assert not mark.exists()
    torch.save(torch.nn.Linear(2, 2), file)
    refused(file, ValueError, "only plain tensors are loaded")
    torch.save({"x": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:1500])
    refused(file, ValueError, "damaged, cut short, or something else")
    for content in (b"", b"not a checkpoint", b"\x80\x02"):
        file.write_bytes(content)
        refused(file, ValueError, "damaged, cut short, or something else")
    for holds, says in [([torch.zeros(3)], "got a list"), ({}, "an empty dictionary"), ({"state_dict": {}}, "'state_dict' (dict)"), (torch.zeros(3), "got a Tensor")]:
        torch.save(holds, file)
        refused(file, ValueError, says)
    refused(tmp_path / "nowhere.pt", FileNotFoundError, "there is no checkpoint file")
    refused(tmp_path, FileNotFoundError, "there is no checkpoint file")


@pytest.mark.parametrize("old_format", [False, True])
def test_as_a_dpi_model_both_sets_are_the_files(old_format, tmp_path):
    plain = adm_keys(1, 1, 32, (1, 2), 1, (1,), emb=False)
    told = adm_keys(1, 1, 32, (1, 2), 1, (1,), classes=5)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])
    file = tmp_path / "net.pt"
    small = drunet_keys(1, 1, (4, 6, 8), 2)
    for cls, shapes, settings, more in [(DRUNet, small, {}, ()),
                                        (ADM, plain, TWO_HEADS, ()),
                                        (ADM, told, TWO_HEADS, (t, y))]:
        w = weights(shapes)
        torch.save(w, file, _use_new_zipfile_serialization=not old_format)
        net = cls.from_public(file, **settings)
        model = cls.from_public(file, dpi=True, **settings)
        assert isinstance(model, DPI) and not model.training and not model.net.training
        params = dict(model.theta1.named_parameters())
        assert set(params) == set(w) and all(torch.equal(p, w[k]) and p.data_ptr() != model.net.get_parameter(k).data_ptr() for k, p in params.items())
        x = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            for s in (0, 123.4, 999):
                assert torch.equal(model(x, s, *more), net(x, *more))
            torch.testing.assert_close(model(x, torch.tensor([0., 500.5, 999.]), *more), net(x, *more), rtol=1e-4, atol=1e-4)


def test_half_precision_files_become_float32(tmp_path):
    w = weights(drunet_keys(1, 1, (4, 6), 1))
    torch.save({k: v.half() for k, v in w.items()}, tmp_path / "net.pth")
    net = DRUNet.from_public(tmp_path / "net.pth")
    assert all(p.dtype == torch.float32 and torch.equal(p, w[k].half().float()) for k, p in net.named_parameters())

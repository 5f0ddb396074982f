"""Networks by others, in tiny configurations made without a download.

A family is skipped where its package is not installed; transformers and diffusers
are in [dev]. `pytest tests/test_third_party.py -rA` prints how each network runs.
"""
import importlib
import importlib.util
import sys
import types
import warnings

import plain
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dpi_nbdev import DPI, LinearLambda, check_exact

pytestmark = pytest.mark.filterwarnings("ignore")
S = torch.tensor([0.5, 0.1, 0.9, 0.1])
B = len(S)
NETS = {}


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def whole(high, *shape):
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(2))


def network(package, x, *args, modes=(False, True), marks=(), **kwargs):
    "Enters a function that makes a network of `package`, and what it is called with."
    def enter(make):
        NETS[make.__name__] = types.SimpleNamespace(
            make=make, package=package, x=x, args=args, kwargs=kwargs, modes=modes,
            marks=marks)
        return make
    return enter


def bare(package, module):
    "A module of a package whose __init__ wants more than is installed."
    pytest.importorskip("einops")
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed")
        holder = types.ModuleType(package)
        holder.__spec__ = spec
        holder.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = holder
    try:
        return importlib.import_module(f"{package}.{module}")
    except ImportError as e:
        pytest.skip(str(e))


# ---- transformers: masks by keyword, as everybody calls them

ids, mask = whole(20, B, 6), torch.ones(B, 6).long()
mask[1, 4:], mask[2, 3:] = 0, 0
text = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16, pad_token_id=0)
calm = dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
pixels = rand(B, 3, 8, 8)
seen = dict(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=16, **calm)
by_mask = network("transformers", ids, attention_mask=mask)
causal = network("transformers", ids, attention_mask=mask, use_cache=False)


def hf(name, config, **kw):
    "A model of transformers, and its configuration."
    import transformers
    model = getattr(transformers, name)
    return model(getattr(transformers, config)(**kw))


@by_mask
def bert(): return hf("BertModel", "BertConfig", **text, **calm)


@network("transformers", ids, attention_mask=mask, return_dict=False)
def bert_tuple(): return hf("BertModel", "BertConfig", **text, **calm)


@network("transformers", ids, attention_mask=mask, token_type_ids=whole(2, B, 6),
         output_hidden_states=True)
def bert_hidden_states(): return hf("BertModel", "BertConfig", **text, **calm)


@network("transformers", ids, mask)
def bert_mask_by_position(): return hf("BertModel", "BertConfig", **text, **calm)


@by_mask
def bert_eager():
    return hf("BertModel", "BertConfig", **text, **calm, attn_implementation="eager")


@by_mask
def bert_masked_lm(): return hf("BertForMaskedLM", "BertConfig", **text, **calm)


@by_mask
def roberta(): return hf("RobertaModel", "RobertaConfig", **text, **calm)


@by_mask
def electra(): return hf("ElectraModel", "ElectraConfig", **text, **calm,
                         embedding_size=8)


@by_mask
def albert():
    return hf("AlbertModel", "AlbertConfig", **text, **calm, embedding_size=8)


@by_mask
def distilbert():
    return hf("DistilBertModel", "DistilBertConfig", vocab_size=20, dim=8, n_layers=2,
              n_heads=2, hidden_dim=16, dropout=0., attention_dropout=0.)


@causal
def llama(): return hf("LlamaModel", "LlamaConfig", **text, num_key_value_heads=1)


@causal
def llama_lm():
    return hf("LlamaForCausalLM", "LlamaConfig", **text, tie_word_embeddings=True)


@causal
def mistral(): return hf("MistralModel", "MistralConfig", **text, num_key_value_heads=1)


@causal
def qwen2(): return hf("Qwen2Model", "Qwen2Config", **text, num_key_value_heads=1)


@causal
def gpt2():
    return hf("GPT2Model", "GPT2Config", vocab_size=20, n_positions=16, n_embd=8,
              n_layer=2, n_head=2, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)


@causal
def gpt_neox(): return hf("GPTNeoXModel", "GPTNeoXConfig", **text, hidden_dropout=0.)


@network("transformers", ids, attention_mask=mask, decoder_input_ids=whole(20, B, 4),
         use_cache=False)
def t5():
    return hf("T5Model", "T5Config", vocab_size=20, d_model=8, d_kv=4, d_ff=16,
              num_layers=2, num_heads=2, dropout_rate=0., decoder_start_token_id=0)


@network("transformers", ids, attention_mask=mask, decoder_input_ids=whole(20, B, 4),
         use_cache=False)
def bart():
    return hf("BartModel", "BartConfig", vocab_size=20, d_model=8, encoder_layers=1,
              decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
              encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.,
              max_position_embeddings=16)


@network("transformers", pixels)
def vit(): return hf("ViTModel", "ViTConfig", **seen)


@network("transformers", pixels, output_attentions=True)
def vit_attentions():
    return hf("ViTModel", "ViTConfig", **seen, attn_implementation="eager")


@network("transformers", pixels)
def deit(): return hf("DeiTModel", "DeiTConfig", **seen)


@network("transformers", pixels)
def clip_vision():
    return hf("CLIPVisionModel", "CLIPVisionConfig", image_size=8, patch_size=4,
              hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
              intermediate_size=16)


@network("transformers", pixels)
def convnext():
    return hf("ConvNextModel", "ConvNextConfig", depths=[1, 1], hidden_sizes=[8, 8],
              num_stages=2, patch_size=2)


@network("transformers", pixels)
def segformer():
    return hf("SegformerModel", "SegformerConfig", num_encoder_blocks=2, depths=[1, 1],
              hidden_sizes=[8, 8], num_attention_heads=[1, 2], sr_ratios=[2, 1],
              strides=[2, 2], patch_sizes=[3, 3], mlp_ratios=[2, 2], drop_path_rate=0.,
              **calm)


@network("transformers", pixels, modes=(False,))
def swin():
    return hf("SwinModel", "SwinConfig", image_size=8, patch_size=2, embed_dim=8,
              depths=[1, 1], num_heads=[1, 2], window_size=2)


@network("transformers", pixels, modes=(False,))
def resnet():
    return hf("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8],
              depths=[1, 1], layer_type="basic")


# ---- diffusers: a U-Net is told the time, and DPI's scalar beside it

times, picture = whole(1000, B), rand(B, 3, 8, 8)
small = dict(sample_size=8, block_out_channels=(8, 8), layers_per_block=1,
             norm_num_groups=4)
unet2d = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"),
              up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4)
crossed = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
               up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
               cross_attention_dim=8, attention_head_dim=2)
words = rand(B, 5, 8)


def diffuser(name, **kw):
    import diffusers
    return getattr(diffusers, name)(**kw)


@network("diffusers", picture, times)
def unet2d_model(): return diffuser("UNet2DModel", **small, **unet2d)


@network("diffusers", picture, 7, return_dict=False)
def unet2d_one_time(): return diffuser("UNet2DModel", **small, **unet2d)


@network("diffusers", picture, times, class_labels=whole(5, B))
def unet2d_classes():
    return diffuser("UNet2DModel", **small, **unet2d, num_class_embeds=5)


@network("diffusers", rand(B, 4, 8, 8), times, encoder_hidden_states=words)
def unet2d_condition(): return diffuser("UNet2DConditionModel", **small, **crossed)


@network("diffusers", rand(B, 4, 8, 8), times, words,
         encoder_attention_mask=whole(3, B, 5) > 1)
def unet2d_condition_masked():
    return diffuser("UNet2DConditionModel", **small, **crossed)


@network("diffusers", rand(B, 4, 8, 8), timestep=times, class_labels=whole(5, B),
         modes=(False,))
def dit():
    return diffuser("DiTTransformer2DModel", num_attention_heads=2,
                    attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8,
                    num_embeds_ada_norm=5, norm_num_groups=4)


@network("diffusers", picture)
def autoencoder_kl():
    return diffuser("AutoencoderKL", block_out_channels=(8, 8), norm_num_groups=4,
                    down_block_types=("DownEncoderBlock2D",) * 2,
                    up_block_types=("UpDecoderBlock2D",) * 2)


@network("diffusers", picture.float())
def autoencoder_tiny():
    return diffuser("AutoencoderTiny", encoder_block_out_channels=(8, 8),
                    decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1))


@network("diffusers", rand(B, 4, 8, 8), times, words,
         controlnet_cond=rand(B, 3, 16, 16), return_dict=False)
def controlnet():
    blocks = crossed["down_block_types"]
    return diffuser("ControlNetModel", block_out_channels=(8, 8), layers_per_block=1,
                    norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
                    down_block_types=blocks, conditioning_embedding_out_channels=(4, 4))


# ---- lucidrains: written with einops

def vit_module(name): return bare("vit_pytorch", name)


patches = dict(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=2,
               mlp_dim=16)


@network("vit_pytorch", pixels)
def vit_plain(): return vit_module("vit").ViT(**patches)


@network("vit_pytorch", pixels)
def vit_simple(): return vit_module("simple_vit").SimpleViT(**patches)


@network("vit_pytorch", pixels)
def vit_deep(): return vit_module("deepvit").DeepViT(**patches)


@network("vit_pytorch", pixels)
def vit_cait(): return vit_module("cait").CaiT(**patches, cls_depth=1)


@network("vit_pytorch", pixels)
def vit_small_data(): return vit_module("vit_for_small_dataset").ViT(**patches)


@network("vit_pytorch", pixels, modes=(False,))
def vit_xcit(): return vit_module("xcit").XCiT(**patches, cls_depth=1)


@network("vit_pytorch", pixels)
def vit_nest():
    return vit_module("nest").NesT(image_size=8, patch_size=2, dim=8, heads=2,
                                   num_hierarchies=2, block_repeats=1, num_classes=3)


@network("vit_pytorch", rand(B, 3, 16, 16), modes=(False,))
def vit_levit():
    return vit_module("levit").LeViT(image_size=16, num_classes=3, dim=8, depth=1,
                                     heads=2, mlp_mult=2, stages=1)


@network("vit_pytorch", rand(B, 3, 16, 16), modes=(False,))
def vit_max():
    return vit_module("max_vit").MaxViT(num_classes=3, dim=8, depth=(1,), dim_head=4,
                                        dim_conv_stem=8, window_size=2)


@network("denoising_diffusion_pytorch", picture, whole(1000, B).double(),
         modes=(False,))
def karras_unet():
    module = bare("denoising_diffusion_pytorch", "karras_unet")
    return module.KarrasUnet(image_size=8, dim=8, dim_max=16, channels=3, dropout=0.,
                             num_downsamples=1, num_blocks_per_stage=1, attn_res=(4,),
                             attn_dim_head=4, fourier_dim=8)


@network("x_transformers", ids, mask=mask.bool())
def x_encoder():
    import x_transformers as xt
    layers = xt.Encoder(dim=8, depth=1, heads=2, attn_dim_head=32, rotary_pos_emb=True)
    return xt.TransformerWrapper(num_tokens=20, max_seq_len=8, attn_layers=layers)


@network("x_transformers", ids, marks=pytest.mark.xfail(
    strict=True, reason="a buffer registered at the first call"))
def x_decoder():
    import x_transformers as xt
    layers = xt.Decoder(dim=8, depth=1, heads=2, attn_dim_head=4, alibi_pos_bias=True,
                        use_rmsnorm=True, ff_glu=True)
    return xt.TransformerWrapper(num_tokens=20, max_seq_len=8, attn_layers=layers)


@network("x_transformers", rand(B, 6, 8), context=rand(B, 3, 8),
         context_mask=whole(3, B, 3) > 1)
def x_cross():
    import x_transformers as xt
    return xt.Encoder(dim=8, depth=1, heads=2, attn_dim_head=4, cross_attend=True)


# ---- operators, medicine, equivariance, graphs

@network("neuralop", rand(B, 2, 8, 8).float())
def fno():
    from neuralop.models import FNO
    return FNO(n_modes=(4, 4), in_channels=2, out_channels=1, hidden_channels=8,
               n_layers=2)


@network("neuralop", rand(B, 2, 8, 8).float())
def fno_factorised():
    from neuralop.models import TFNO
    return TFNO(n_modes=(4, 4), in_channels=2, out_channels=1, hidden_channels=8,
                n_layers=1, rank=0.5)


@network("neuralop", rand(B, 2, 8, 8).float())
def uno():
    from neuralop.models import UNO
    return UNO(in_channels=2, out_channels=1, hidden_channels=8, n_layers=2,
               uno_out_channels=[8, 8], uno_n_modes=[[4, 4], [4, 4]],
               uno_scalings=[[1., 1.], [1., 1.]], channel_mlp_skip="linear")


@network("monai", rand(B, 1, 8, 8))
def monai_unet():
    from monai.networks.nets import UNet
    return UNet(2, 1, 1, (4, 8), (2,), num_res_units=1)


@network("monai", rand(B, 1, 8, 8, 8))
def monai_unet_3d():
    from monai.networks.nets import UNet
    return UNet(3, 1, 1, (4, 8), (2,), norm="instance")


@network("monai", rand(B, 1, 8, 8), whole(1000, B))
def monai_diffusion():
    from monai.networks.nets import DiffusionModelUNet
    return DiffusionModelUNet(2, 1, 1, channels=(8, 8), num_res_blocks=1,
                              attention_levels=(False, True), norm_num_groups=4,
                              num_head_channels=4)


@network("monai", rand(B, 1, 8, 8), modes=(False,))
def monai_densenet():
    from monai.networks.nets import DenseNet
    return DenseNet(2, 1, 2, init_features=4, growth_rate=4, block_config=(1, 1))


@network("monai", rand(B, 1, 32, 32))
def monai_segresnet():
    from monai.networks.nets import SegResNet
    return SegResNet(2, init_filters=8, in_channels=1, out_channels=1)


@network("e3nn", rand(B, 8))
def e3nn_layers():
    from e3nn import nn as enn
    from e3nn import o3
    irreps = o3.Irreps("2x0e + 2x1o")
    square = o3.FullyConnectedTensorProduct(irreps, irreps, irreps)

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.square = o3.Linear(irreps, irreps), square
            self.norm = enn.NormActivation(irreps, torch.tanh)

        def forward(self, x):
            h = self.norm(self.one(x))
            return self.square(h, h)
    return Layers()


class Graphs(nn.Module):
    "Graph layers on B graphs with the same edges, nodes on the second axis."
    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))

    def forward(self, x): return self.two(self.one(x, self.edges).relu(), self.edges)


@network("torch_geometric", rand(B, 4, 8))
def graph_gcn():
    from torch_geometric.nn import GCNConv
    return Graphs(GCNConv(8, 8), GCNConv(8, 3))


@network("torch_geometric", rand(B, 4, 8))
def graph_sage():
    from torch_geometric.nn import SAGEConv
    return Graphs(SAGEConv(8, 8), SAGEConv(8, 3))


@network("torch_geometric", rand(B, 4, 8))
def graph_cheb():
    from torch_geometric.nn import ChebConv
    return Graphs(ChebConv(8, 8, 2), ChebConv(8, 3, 2))


# ---- the tests

def installed(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def born(kind):
    "The network, new, always with the same numbers; in double precision."
    torch.manual_seed(0)
    net = kind.make()
    net = net if kind.x.dtype == torch.float32 else net.double()
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in net.parameters():   # no layer that starts at zero stays there
            p += 0.05 * torch.randn(p.shape, generator=draw).to(p)
    return net


def apart(kind):
    "A DPI model on [0, 1] whose two sets differ."
    model = DPI(born(kind), LinearLambda(0, 1))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.theta1.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draw).to(p)
    return model


def caller(kind):
    def call(f, x, rows):
        cut = lambda v: v[rows].clone() if isinstance(v, torch.Tensor) else v
        args, kwargs = tree_map(cut, (kind.args, kind.kwargs))
        return f(x, *args, **kwargs)
    return call


NAMES = [pytest.param(name, marks=kind.marks) for name, kind in NETS.items()]


@pytest.mark.parametrize("name", NAMES)
def test_networks_by_others_are_exact(name):
    kind = NETS[name]
    installed(kind.package)
    model, tolerance = apart(kind), 1e-4 if kind.x.dtype == torch.float32 else 1e-9
    sets, call = plain.two_sets(model), caller(kind)
    off = check_exact(model.eval(), kind.x, S, *kind.args, **kind.kwargs)
    worst = {"check_exact": off}
    for training in kind.modes:
        model.train(training)
        got = plain.by_dpi(model, S, call, kind.x)
        nets = [born(kind).train(training) for _ in S]
        want = plain.by_hand(nets, sets, S, call, kind.x)
        worst[f"training={training}"] = plain.largest(got, want)
    model.eval()
    with torch.no_grad():
        frozen = tree_leaves(call(model.freeze_at(S[1]), kind.x[1:2], slice(1, 2)))
        shared = tree_leaves(call(lambda x, *a, **k: model(x, S[1], *a, **k),
                                  kind.x, slice(None)))
    for a, b in zip(frozen, shared):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b[1:2], rtol=tolerance, atol=tolerance)
    print(f"RESULT {kind.package} {name} {model.plan(S)} {max(worst.values()):.1e}")
    assert max(worst.values()) < tolerance, worst


def test_a_loss_over_the_batch_is_refused_for_many_scalars():
    installed("transformers")
    make = lambda: hf("BertForSequenceClassification", "BertConfig", **text, **calm)
    kind = types.SimpleNamespace(make=make, x=ids)
    model, labels = apart(kind), whole(2, B)
    given = dict(attention_mask=mask, labels=labels)
    with pytest.raises(ValueError):
        model(ids, S, **given)
    many = model(ids, S, attention_mask=mask)
    assert many.logits.shape == (B, 2)


def test_a_loss_over_the_batch_with_one_scalar():
    installed("transformers")
    make = lambda: hf("BertForSequenceClassification", "BertConfig", **text, **calm)
    model = apart(types.SimpleNamespace(make=make, x=ids)).eval()
    given = dict(attention_mask=mask, labels=whole(2, B))
    frozen = model.freeze_at(0.3)(ids, **given)
    torch.testing.assert_close(model(ids, 0.3, **given).loss, frozen.loss)


def test_a_cache_of_keys_is_refused_for_many_scalars():
    installed("transformers")
    kind = NETS["gpt2"]
    model = apart(kind).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="not of DynamicCache"):
        model(ids, S, attention_mask=mask, use_cache=True)

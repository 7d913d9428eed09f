"""How the models of each library are built for the zoo: tiny, at random, without any download."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import inspect
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import zoo_generic
import zoo_transformers
from torch import library as torch_library
from torch import nn


class Library(NamedTuple):
    """A library of models: its package, the names of its models, and how to build one."""

    package: str
    names: Callable[[], list[str]]
    build: Callable[[str], tuple[Any, ...]]


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a model, and the arguments of its call


def call(model: nn.Module, *args: Any, **kwargs: Any) -> Call:
    """Return a model with the arguments of its call."""
    return model, args, kwargs


def first_that_runs(candidates: Iterable[Callable[[], Call]]) -> Call:
    """Return the first candidate that computes something, or the last one."""
    *others, last = candidates
    for build in others:
        with contextlib.suppress(Exception):
            model, args, kwargs = build()
            with torch.no_grad():
                copy.deepcopy(model).eval()(*args, **kwargs)
            return model, args, kwargs
    return last()


def images(size: int, channels: int = 3) -> torch.Tensor:
    """Return two square images."""
    return torch.randn(2, channels, size, size)


# --- timm: the smallest model of each of its modules

WORDS = ["test", "atto", "femto", "pico", "nano", "xx", "tiny", "_t", "mini", "_xs", "small", "_s", "base", "_b", "_m"]
TINY_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 4}


def timm_names() -> list[str]:
    """Return a model of each module: the one whose name sounds smallest."""
    import timm

    def size(name: str) -> tuple[int, list[int], str]:
        rank = next((index for index, word in enumerate(WORDS) if word in name), len(WORDS) - 3)
        return rank, [int(number) for number in re.findall(r"\d+", name)], name

    return [min(timm.list_models(module=module), key=size) for module in timm.list_modules()]


def build_timm(name: str) -> Call:
    """Return a model of timm, as narrow and with as small images as its class takes."""
    import timm

    default = timm.get_pretrained_cfg(name).input_size[-1]

    def build(size: int, **options: Any) -> Call:
        return call(timm.create_model(name, num_classes=10, **options), images(size))

    return first_that_runs(
        [
            lambda: build(64, img_size=64, **TINY_VIT),
            lambda: build(224, img_size=224, **TINY_VIT),
            lambda: build(64, img_size=64),
            lambda: build(64),
            lambda: build(128),
            lambda: build(128, img_size=128),
            lambda: build(default),
        ]
    )


# --- torchvision: the smallest model of each of its modules


def torchvision_names() -> list[str]:
    """Return a model of each module: the one with the fewest parameters."""
    from torchvision import models

    smallest: dict[str, tuple[int, str]] = {}
    for name in models.list_models():
        weights = list(models.get_model_weights(name))
        size = min(each.meta["num_params"] for each in weights) if weights else 0
        module = models.get_model_builder(name).__module__
        smallest[module] = min(smallest.get(module, (size, name)), (size, name))
    return [name for _, name in smallest.values() if not name.startswith("quantized_")]


def build_torchvision(name: str) -> Call:
    """Return a model of torchvision with a few classes and images as small as it takes."""
    from torchvision import models

    def build(*shape: int, **options: Any) -> Call:
        return call(models.get_model(name, weights=None, **options), torch.randn(*shape))

    few = {"num_classes": 10}
    if "raft" in name:
        return call(models.get_model(name), images(128), images(128))
    if "rcnn" in name or "retina" in name or "ssd" in name or "fcos" in name:
        return call(models.get_model(name, weights=None, weights_backbone=None), list(images(128)))
    return first_that_runs(
        [
            lambda: build(2, 3, 64, 64, image_size=64, **few) if name.startswith("vit") else build(2, 3, 64, 64, **few),
            lambda: build(2, 3, 128, 128, **few),
            lambda: build(2, 3, 224, 224, weights_backbone=None, **few),
            lambda: build(2, 3, 224, 224, **few),
            lambda: build(1, 3, 8, 64, 64, **few),
            lambda: build(1, 3, 16, 224, 224, **few),
        ]
    )


# --- torch_geometric: every convolution, and the models built of them

NODES, WIDTH = 12, 8


def graph() -> dict[str, Any]:
    """Return what convolutions on graphs take, by the names of their arguments."""
    edges = torch.stack([torch.arange(3 * NODES) % NODES, (torch.arange(3 * NODES) * 5 + 1) % NODES])
    ids = {"edge_type": torch.arange(edges.shape[1]) % 3, "node_type": torch.arange(NODES) % 2}
    positions = {"pos": torch.randn(NODES, 3), "normal": torch.randn(NODES, 3), "z": torch.arange(NODES) % 9 + 1}
    return {
        "x": torch.randn(NODES, WIDTH),
        "x_0": torch.randn(NODES, WIDTH),
        "edge_index": edges,
        "hyperedge_index": edges,
        "pos_edge_index": edges,
        "neg_edge_index": edges.flip(0),
        "edge_attr": torch.rand(edges.shape[1], WIDTH),
        "batch": torch.arange(NODES) // (NODES // 2),
        **ids,
        **positions,
    }


def mlp(inputs: int, outputs: int = WIDTH) -> nn.Module:
    """Return the small network that some convolutions are given."""
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs))


def graph_options() -> dict[str, Any]:
    """Return what constructors take, by the names of their arguments."""
    from torch_geometric import nn as gnn

    encoder = gnn.GCNConv(WIDTH, WIDTH)
    return {
        **dict.fromkeys(("in_channels", "out_channels", "hidden_channels", "channels", "embedding_dim"), WIDTH),
        **dict.fromkeys(("hidden_node_channels", "hidden_edge_channels", "int_emb_size", "basis_emb_size"), WIDTH),
        **dict.fromkeys(("num_filters", "out_emb_channels", "space_dimensions", "propagate_dimensions"), WIDTH),
        **dict.fromkeys(("edge_dim", "edge_type_emb_dim", "edge_attr_emb_dim", "dim"), WIDTH),
        **dict.fromkeys(("num_layers", "num_blocks", "num_interactions", "depth", "num_heads", "kernel_size", "K"), 2),
        "alpha": 0.1,
        "filter_size": 3,
        "num_relations": 3,
        "num_edge_types": 3,
        "num_node_types": 2,
        "num_nodes": NODES,
        "nn": mlp(WIDTH),
        "conv": encoder,
        "encoder": encoder,
        "aggregators": ["mean", "max"],
        "scalers": ["identity"],
        "deg": torch.tensor([0, 0, 0, 12]),
        "mode": "cat",
        "k": 3,
        "num_timesteps": 2,
        "num_bilinear": 4,
        "num_spherical": 3,
        "num_radial": 3,
        "num_classes": 3,
    }


SPECIAL_GRAPHS: dict[str, dict[str, Any]] = {
    "EdgeConv": {"nn": mlp(2 * WIDTH)},
    "GMMConv": {"dim": WIDTH},
    "MLP": {"in_channels": WIDTH, "hidden_channels": WIDTH, "out_channels": WIDTH, "num_layers": 3},
    "NNConv": {"nn": mlp(WIDTH, WIDTH * WIDTH)},
    "PNA": {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 0, 0, 12])},
    "PointGNNConv": {"mlp_h": mlp(WIDTH, 3), "mlp_f": mlp(WIDTH + 3), "mlp_g": mlp(WIDTH)},
    "PointNetConv": {"local_nn": mlp(WIDTH + 3)},
    "PPFConv": {"local_nn": mlp(WIDTH + 4)},
    "SignedConv": {"first_aggr": True},
}


class Net(nn.Module):
    """A network of one layer: what belongs to a network itself cannot be named."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, **arguments: Any) -> Any:
        """Return what the layer does."""
        return self.layer(**arguments)


def geometric_names() -> list[str]:
    """Return every convolution, and every model that takes a graph."""
    from torch_geometric.nn import conv, models

    skipped = ("MessagePassing", "CuGraph", "Fused", "to_captum", "captum", "Hetero", "Node2Vec", "MetaPath", "Label")
    kinds = {"conv": conv.__all__, "models": models.__all__}
    return [f"{kind}/{name}" for kind, found in kinds.items() for name in found if not name.startswith(skipped)]


def build_geometric(name: str) -> Call:
    """Return a convolution or a model on a small graph: with features of edges where it takes them."""
    from torch_geometric import nn as gnn

    kind, name = name.split("/")
    cls = getattr(gnn, name)
    options, given = graph_options(), graph()

    def taken(function: Callable[..., Any], known: dict[str, Any], *more: str) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters
        needed = {key for key, each in parameters.items() if each.default is inspect.Parameter.empty}
        return {key: known[key] for key in parameters if key in known and key in {*needed, *more}}

    def build(*edges: str) -> Call:
        constructed = taken(cls.__init__, options, "local_nn", "hidden_channels", "num_layers", *edges)
        model = cls(**constructed | SPECIAL_GRAPHS.get(name, {}))
        arguments = taken(model.forward, given, "edge_index", "edge_type", "batch", *edges)
        return call(Net(model) if kind == "conv" else model, **arguments)

    return first_that_runs([lambda: build("edge_dim", "edge_attr"), build])


# --- segmentation_models_pytorch, open_clip


def segmentation_names() -> list[str]:
    """Return every architecture with its usual encoder, and one of them with encoders of other families."""
    import segmentation_models_pytorch as smp

    encoders = ("densenet121", "dpn68", "efficientnet-b0", "mit_b0", "mobilenet_v2", "mobileone_s0", "timm-regnetx_002")
    names = [
        f"{cls.__name__}/{'tu-vit_tiny_patch16_224' if cls is smp.DPT else 'resnet18'}"
        for cls in smp._MODEL_ARCHITECTURES
    ]
    return [*names, *(f"Unet/{encoder}" for encoder in (*encoders, "se_resnet50", "tu-convnext_atto", "vgg11"))]


def build_segmentation(name: str) -> Call:
    """Return a segmentation model."""
    import segmentation_models_pytorch as smp

    architecture, encoder = name.split("/")
    model = getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, classes=3)
    return first_that_runs(lambda size=size: call(model, images(size)) for size in (64, 224))


TEXT = {"context_length": 16, "vocab_size": 128, "width": 32, "heads": 4, "layers": 2}
CLIPS: dict[str, dict[str, Any]] = {
    "ViT": {"vision_cfg": {"layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "image_size": 64}},
    "ModifiedResNet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}},
    "timm": {
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    },
    "attentional-pool": {
        "vision_cfg": {
            "layers": 2,
            "width": 32,
            "head_width": 8,
            "patch_size": 16,
            "image_size": 64,
            "attentional_pool": True,
            "attn_pooler_queries": 4,
            "attn_pooler_heads": 4,
        }
    },
    "EVA": {"vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": 224}},
}


def clip_names() -> list[str]:
    """Return the kinds of vision towers, each with CLIP's own text tower and with one apart, and CoCa."""
    import open_clip  # noqa: F401

    return [*(f"{cls}/{tower}" for cls in ("CLIP", "CustomTextCLIP") for tower in CLIPS), "CoCa/ViT"]


def build_clip(name: str) -> Call:
    """Return a model of open_clip."""
    import open_clip.model
    from open_clip.coca_model import CoCa

    kind, tower = name.split("/")
    cls = CoCa if kind == "CoCa" else getattr(open_clip.model, kind)
    vision = dict(CLIPS[tower]["vision_cfg"])
    options: dict[str, Any] = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": dict(TEXT)}
    if kind == "CoCa":
        vision |= CLIPS["attentional-pool"]["vision_cfg"]
        options["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        options["multimodal_cfg"] = {**TEXT, "layers": 2}
        vision["output_tokens"] = True
    return call(cls(**options), images(vision["image_size"]), torch.randint(1, 128, (2, 16)))


def by_name(package: str, builders: Callable[[], dict[str, Callable[[], Call]]]) -> Library:
    """Return a library whose models have a builder each."""
    return Library(package, lambda: list(builders()), lambda name: builders()[name]())


LIBRARIES = {
    "transformers": Library("transformers", zoo_transformers.names, zoo_transformers.build),
    "timm": Library("timm", timm_names, build_timm),
    "torchvision": Library("torchvision", torchvision_names, build_torchvision),
    "torch_geometric": Library("torch_geometric", geometric_names, build_geometric),
    "segmentation_models_pytorch": Library("segmentation_models_pytorch", segmentation_names, build_segmentation),
    "open_clip": Library("open_clip_torch", clip_names, build_clip),
    "diffusers": Library("diffusers", zoo_generic.diffusers_names, zoo_generic.build_diffusers),
    "torchaudio": by_name("torchaudio", zoo_generic.audio_builders),
    "speechbrain": Library("speechbrain", zoo_generic.brain_names, zoo_generic.build_brain),
    "pytorch_forecasting": Library("pytorch-forecasting", zoo_generic.forecasting_names, zoo_generic.build_forecasting),
}


def prepare() -> None:
    """Make a process ready for models: quiet, and with stand-ins for what cannot be imported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    stand_in_operators()


def names(libraries: Sequence[str] | None = None) -> list[str]:
    """Return "library/name" of every model; a library that is not installed has none."""
    prepare()
    found = []
    for library in libraries or LIBRARIES:
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out", file=sys.stderr)
        else:
            found += [f"{library}/{name}" for name in LIBRARIES[library].names()]
    return found


def examine(name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Build a model and examine it."""
    from zoo_checks import Examination, Specimen, first_line  # imports Lightning, which imports torchvision

    library, _, inner = name.partition("/")
    tell("build")
    torch.manual_seed(0)
    try:
        specimen = Specimen(*LIBRARIES[library].build(inner))
    except Exception as error:
        return {"verdict": "unbuildable", "reason": f"{type(error).__name__}: {first_line(error)}"}
    try:
        return Examination(specimen, tell).result()
    finally:
        gc.collect()


_OPERATORS: list[torch_library.Library] = []  # operators go when what holds them goes


def stand_in_operators() -> None:
    """Let the Python models of torchvision and torchaudio be imported where their compiled parts do not load."""
    if _OPERATORS:
        return
    operators = torch_library.Library("torchvision", "FRAGMENT")
    _OPERATORS.append(operators)
    with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: the operators are there
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import torchvision  # noqa: F401
    if importlib.util.find_spec("torchaudio"):
        compiled: Any = types.ModuleType("torchaudio._extension")
        compiled._IS_TORCHAUDIO_EXT_AVAILABLE = compiled._IS_ALIGN_AVAILABLE = False
        compiled.fail_if_no_align = lambda function: function
        sys.modules[compiled.__name__] = compiled

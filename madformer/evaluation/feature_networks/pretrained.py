"""Feature networks with published weights: Inception in its two forms, TorchScript files, models of transformers."""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.errors import InputError
from madformer.evaluation.feature_networks.network import FeatureNetwork, Features, as_files, make_label
from madformer.evaluation.measurement import INCEPTION
from madformer.lookup import CONFIG, describe, find_model, first_line
from madformer.runs.checkpoints import weights_sha256

_FIDELITY_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's file. Its name contains the first digits of its SHA-256, by torch.hub's convention."""

_WEIGHTS_SHA256 = "6726825d"

_SCRIPT = "inception-2015-12-05.pt"
_SCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""NVIDIA's file, the same network."""


class _Inception(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCYX: Tensor) -> Features:
        features_BD, logits_BK = self.network(as_files(images_BCYX))
        return Features(features_BD, logits_BK)


class _Script(nn.Module):
    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script
        arguments = {argument.name for argument in script.forward.schema.arguments}
        self.options = {"return_features": True} if "return_features" in arguments else {}

    def forward(self, images_BCYX: Tensor) -> Tensor:
        return self.script(as_files(images_BCYX), **self.options)


def build_inception(name: str, file: Path | None) -> FeatureNetwork:
    """The Inception of torch-fidelity, with 2,048 features and 1,008 logits.

    Args:
        name: as in `evaluation.feature_networks`.
        file: its weights; None: torch-fidelity's own, from torch.hub's cache or the network. With other weights, the label is
            the file's name.

    Raises:
        InputError: torch-fidelity is not installed, or the weights are not available.
    """
    library = _import_library()
    path = _find_weights(library.URL_INCEPTION_V3) if file is None else file
    genuine = _sha256(path).startswith(_WEIGHTS_SHA256)
    if file is None and not genuine:
        raise InputError(f"{path} is torn: remove it, and it is downloaded again")
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run code in it
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # a file of weights can be broken in every way
        remedy = f"as torch-fidelity's {_FIDELITY_WEIGHTS} does; a TorchScript file is torchscript:FILE"
        raise InputError(f"{path} holds no weights of this network, {remedy}") from error
    parts = ("inception-v3-compat", weights_sha256(network))
    sha256 = hashlib.sha256(repr(parts).encode()).hexdigest()
    return FeatureNetwork(name, INCEPTION if genuine else make_label("file", path.stem), _Inception(network), sha256, 2048)


def build_torchscript(name: str, file: Path) -> FeatureNetwork:
    """A TorchScript file whose `forward` takes images [B, 3, Y, X] uint8 of any size.

    If `forward` has an argument `return_features`, it is set.

    Raises:
        InputError: the file does not exist, or is not a feature network.
    """
    sha256 = _sha256(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript's successor does not read its files
            script = torch.jit.load(str(file), map_location="cpu")
    except Exception as error:  # a file can be broken in every way
        raise InputError(f"{file} is not a TorchScript file: {first_line(error)}") from error
    label = INCEPTION if sha256 == _SCRIPT_SHA256 else make_label("torchscript", file.stem)
    return FeatureNetwork(name, label, _Script(script), sha256)


def _import_library() -> Any:
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise InputError("needs torch-fidelity and torchvision: pip install 'madformer[fid]'") from error
    except Exception as error:  # a torchvision that was built for another torch
        remedy = f"it needs a torchvision that was built for torch {torch.__version__}"
        raise InputError(f"torch-fidelity cannot be imported ({describe(error)}): {remedy}") from error


def _find_weights(url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / _FIDELITY_WEIGHTS
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_WEIGHTS_SHA256, progress=False)
        except Exception as error:  # the network's and the disk's
            remedy = f"inception:FILE takes a local {_FIDELITY_WEIGHTS}, torchscript:FILE a local {_SCRIPT}"
            raise InputError(f"its weights cannot be downloaded ({first_line(error)}); {remedy}") from error
    return path


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"no such file: {file}")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which image processors use."""

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
"""Names of the class token's parameter. The class token is token 0."""

_IRRELEVANT = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version")
"""Entries of config.json that do not change features."""


@dataclass(frozen=True)
class _Input:
    """The input that a network expects."""

    height: int
    width: int
    filter: str
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def prepare(self, images_BCYX: Tensor) -> Tensor:
        """Turn bytes [B, 3, Y, X] into the network's input.

        The whole image is resized as Pillow does it for published distances: along x, then along y, with rounding after each.
        """
        images_BCYX = images_BCYX.float()
        for size in ((images_BCYX.shape[2], self.width), (self.height, self.width)):
            if images_BCYX.shape[2:] != size:
                resized_BCYX = F.interpolate(images_BCYX, size, mode=self.filter, antialias=True)
                images_BCYX = (resized_BCYX.clamp(0, 255) + 0.5).floor()
        mean_C, deviation_C = (images_BCYX.new_tensor(each).view(-1, 1, 1) for each in (self.mean, self.deviation))
        return (images_BCYX * self.scale - mean_C) / deviation_C


class _Pretrained(nn.Module):
    """A vision network with one vector of its output for each image."""

    def __init__(self, network: nn.Module, input: _Input, has_pooler: bool) -> None:
        super().__init__()
        self.network, self.input, self.has_pooler = network, input, has_pooler
        names = {name.rpartition(".")[2] for name, _ in network.named_parameters()}
        self.has_class_token = not names.isdisjoint(_CLASS_TOKENS)

    def forward(self, images_BCYX: Tensor) -> Tensor:
        """The pooled output, else the class token, else the mean over tokens or pixels."""
        outputs = self.network(pixel_values=self.input.prepare(as_files(images_BCYX)), return_dict=True)
        pooled = getattr(outputs, "pooler_output", None)
        if self.has_pooler and pooled is not None:
            return pooled.flatten(1)
        hidden = outputs.last_hidden_state
        if hidden.ndim == 4:
            return hidden.mean((2, 3))
        return hidden[:, 0] if self.has_class_token else hidden.mean(1)


def build_pretrained(name: str, location: str) -> FeatureNetwork:
    """A vision network of transformers. If it has a text tower too, only its vision tower is used.

    Args:
        name: as in `evaluation.feature_networks`.
        location: a folder that `save_pretrained` wrote, or a hub id. Files in the hub's cache are used without asking the hub.

    Raises:
        InputError: the network is not available, or does not take single images.
    """
    folder = find_model(location, _PROCESSORS, _WEIGHTS)
    with _quiet():
        input = _read_input(folder)
        network, has_pooler = _load(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    decides = (type(network).__name__, relevant, astuple(input), has_pooler, weights_sha256(network))
    sha256 = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    tail = Path(location).name
    is_fd_dinov2 = tail == "dinov2-large" and config.get("model_type") == "dinov2" and config.get("hidden_size") == 1024
    label = "dinov2" if is_fd_dinov2 else make_label("hf", tail)  # the network of FD-DINOv2 (Stein et al. 2023)
    return FeatureNetwork(name, label, _Pretrained(network, input, has_pooler), sha256)


def _load(folder: Path) -> tuple[Any, bool]:
    """The network, and whether its pooler is trained: checkpoints of classifiers may lack the pooler's weights."""
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a folder can be broken in every way
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    network = getattr(model, "vision_model", model)
    prefix = "" if network is model else "vision_model."
    missing = {key for key in info["missing_keys"] if key.startswith(prefix)}
    untrained = {key for key in missing if "pooler" in key.split(".")}
    if missing - untrained:
        raise InputError(f"the weights in {folder} are incomplete: {min(missing - untrained)} is missing")
    return network, not untrained


def _read_input(folder: Path) -> _Input:
    from transformers import AutoImageProcessor

    if not any((folder / file).is_file() for file in _PROCESSORS):
        raise InputError(f"{folder} holds no {_PROCESSORS[0]}: it does not say what images the network takes")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    except Exception as error:  # a file can be broken in every way
        raise InputError(f"the image processor in {folder} cannot be loaded: {first_line(error)}") from error
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    height, width = ((size or {}).get(side) or (size or {}).get("shortest_edge") for side in ("height", "width"))
    filter = _FILTERS.get(processor.get("resample") or 0)
    if height is None or width is None or filter is None:
        found = f"size {size}, resample {processor.get('resample')}"
        raise InputError(f"the image processor in {folder} resizes in a way that is not known here: {found}")
    normalised = processor.get("do_normalize")
    return _Input(
        height=height,
        width=width,
        filter=filter,
        scale=processor["rescale_factor"] if processor.get("do_rescale") else 1.0,
        mean=tuple(processor["image_mean"]) if normalised else (0.0,),
        deviation=tuple(processor["image_std"]) if normalised else (1.0,),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's progress bars, and its reports on missing and unused weights."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

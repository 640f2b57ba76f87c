"""Inception, the network of FID: torch-fidelity's, or a TorchScript file as StyleGAN and EDM use it; other such files, too.

Both resize as TensorFlow 1 did, without antialiasing, so that both give the published FID.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from madformer.config.rules import InputError
from madformer.evaluation.features.network import INCEPTION, FeatureNetwork, Features, as_files, make_label
from madformer.fingerprint import weights_sha256
from madformer.importing import describe, first_line

_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's file. Its name holds the first digits of its SHA-256, as is torch.hub's custom."""

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
        file: its weights; None: torch-fidelity's own, from the cache of torch.hub or the network. Of other weights, the label
            is the file's name.

    Raises:
        InputError: torch-fidelity is not installed, or there are no such weights.
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
        remedy = f"as torch-fidelity's {_WEIGHTS} does; a TorchScript file is torchscript:FILE"
        raise InputError(f"{path} holds no weights of this network, {remedy}") from error
    parts = ("inception-v3-compat", weights_sha256(network))
    sha256 = hashlib.sha256(repr(parts).encode()).hexdigest()
    return FeatureNetwork(name, INCEPTION if genuine else make_label("file", path.stem), _Inception(network), sha256, 2048)


def build_torchscript(name: str, file: Path) -> FeatureNetwork:
    """A TorchScript file whose `forward` takes images [B, 3, Y, X] uint8 of any size.

    With an argument `return_features`, that is set.

    Raises:
        InputError: there is no such file, or it is no feature network.
    """
    sha256 = _sha256(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what is to replace TorchScript does not read its files
            script = torch.jit.load(str(file), map_location="cpu")
    except Exception as error:  # a file can be broken in every way
        raise InputError(f"{file} is no TorchScript file: {first_line(error)}") from error
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
    path = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_WEIGHTS_SHA256, progress=False)
        except Exception as error:  # the network's and the disk's
            remedy = f"inception:FILE takes a local {_WEIGHTS}, torchscript:FILE a local {_SCRIPT}"
            raise InputError(f"its weights cannot be downloaded ({first_line(error)}); {remedy}") from error
    return path


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"no such file: {file}")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

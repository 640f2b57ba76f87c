"""Custom codecs, as in a user's file: some that work, and some that are none."""

from __future__ import annotations  # dataclasses then look their module up

from dataclasses import dataclass

import diffusers
import torch

from tests.data.vaes import KL


class Custom(torch.nn.Module):
    latent_channels = 2
    downsampling = 4
    scaling_factor = 0.5
    shift_factor = 3.0

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 2, 4, stride=4)
        self.up = torch.nn.ConvTranspose2d(2, 3, 4, stride=4)

    def encode(self, images):
        assert not torch.is_autocast_enabled(images.device.type)
        mean = self.down(images)
        return mean, torch.full_like(mean, 2.0)

    def decode(self, latents):
        return self.up(latents)


@dataclass
class Plain:
    latent_channels: int = 3
    downsampling: int = 2

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return mean, torch.zeros_like(mean)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=2)


class Holder(Plain):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 3, 2, stride=2)

    def encode(self, images):
        return self.net(images), self.net(images)


class Small(Plain):
    limit = 2 * 3 * 16 * 16

    def __init__(self):
        super().__init__()
        self.sizes = []

    def _take(self, tensor, factor):
        self.sizes.append(len(tensor))
        if tensor.numel() * factor > self.limit:
            raise torch.OutOfMemoryError("as on a small device")

    def encode(self, images):
        self._take(images, 1)
        return super().encode(images)

    def decode(self, latents):
        self._take(latents, 4)
        return super().decode(latents)


class Tiled(torch.nn.Module):
    latent_channels = 4
    downsampling = 8

    def __init__(self):
        super().__init__()
        self.vae = diffusers.AutoencoderKL(**KL)
        for part, limit in ((self.vae.encoder, 32), (self.vae.decoder, 4)):
            part.register_forward_pre_hook(lambda module, inputs, limit=limit: self._take(inputs[0], limit))

    def _take(self, tensor, limit):
        if tensor.shape[-1] > limit or len(tensor) > 1:
            raise torch.OutOfMemoryError("as on a small device")

    def encode(self, images):
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents):
        return self.vae.decode(latents).sample


class Failing(Plain):
    def __init__(self):
        raise KeyError("weights\nare elsewhere")


class WithoutChannels(Plain):
    def __init__(self):
        self.latent_channels = None


class WithoutDecode:
    latent_channels = 3
    downsampling = 2
    encode = Plain.encode


class Alone(Plain):
    def encode(self, images):
        return super().encode(images)[0]


class Halved(Plain):
    def decode(self, latents):
        return latents


class NoScale(Plain):
    scaling_factor = 0


class Worded(Plain):
    scaling_factor = "large"


class ManyShifts(Plain):
    shift_factor = (1.0, 2.0)

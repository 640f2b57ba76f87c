"""The released computation, written a second time from its description: one dense sequence, masks, diffusers' U-Net blocks.

It shares no code with the package. Sampling recomputes the training forward at every step. Names of tensors are the released ones.
"""

import math

import torch
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D, DownBlock2D, UpBlock2D
from torch.nn import functional as F

HEAD, CHANNELS, LATENT_CHANNELS, TIME = 64, (16, 32), 4, 128


def scheduler():
    return DDIMScheduler(clip_sample=False)


def unet_blocks():
    common = {"temb_channels": TIME, "resnet_groups": 8}
    first, second = CHANNELS
    attention = {"attention_head_dim": second // 8}
    down = {"in_channels": first, "out_channels": first, "num_layers": 2, "downsample_padding": 1}
    up = {"in_channels": first, "prev_output_channel": second, "num_layers": 3}
    return {
        "downsampler.down_blocks.0": DownBlock2D(**down, **common),
        "downsampler.down_blocks.1": AttnDownBlock2D(
            in_channels=first, out_channels=second, num_layers=2, downsample_type=None, **attention, **common
        ),
        "upsampler.up_blocks.0": AttnUpBlock2D(out_channels=second, **up, **attention, **common),
        "upsampler.up_blocks.1": UpBlock2D(out_channels=first, add_upsample=False, **up, **common),
    }


def random_weights(text_tokens, width, ffn_width, depth, vocab_size, block_tokens=4, seed=0):
    """A state dict of the `imagenet` branch, or of `main` where there is no text, in float64."""
    shapes = {
        f"{name}.{key}": value.shape for name, block in unet_blocks().items() for key, value in block.state_dict().items()
    }
    for half, into, out in (("downsampler", LATENT_CHANNELS, CHANNELS[0]), ("upsampler", width, CHANNELS[1])):
        shapes |= {f"{half}.conv_in.weight": (out, into, 3, 3), f"{half}.conv_in.bias": (out,)}
        shapes |= {f"{half}.time_embedding.linear_1.weight": (TIME, 1), f"{half}.time_embedding.linear_2.weight": (TIME, TIME)}
    for half, into, out in (("downsampler", CHANNELS[1], width), ("upsampler", CHANNELS[0], LATENT_CHANNELS)):
        shapes |= {f"{half}.conv_out.weight": (out, into, 3, 3), f"{half}.conv_out.bias": (out,)}
    shapes["boi_block"] = (1, block_tokens, width)
    if text_tokens:
        shapes |= {"embed_tokens.weight": (vocab_size, width), "lm_head.weight": (vocab_size, width)}
    for layer in range(depth):
        for tower in range(3 if text_tokens else 2):
            at = f"blocks.{layer}"
            shapes |= {f"{at}.{norm}_list.{tower}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
            shapes |= {f"{at}.self_attn.{norm}_list.{tower}.weight": (HEAD,) for norm in ("q_norm", "k_norm")}
            for name, out in (("qkv", 3 * width), ("proj", width)):
                shapes |= {f"{at}.self_attn.{name}_list.{tower}.weight": (out, width)}
                shapes |= {f"{at}.self_attn.{name}_list.{tower}.bias": (out,)}
            shapes |= {f"{at}.mlp_list.{tower}.{name}_proj.weight": (ffn_width, width) for name in ("gate", "up")}
            shapes |= {f"{at}.mlp_list.{tower}.down_proj.weight": (width, ffn_width)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = 0.1 if len(shape) == 1 else 0.003 if shape[1] == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        weights[name] = scale * values + ("norm" in name and name.endswith("weight") and len(shape) == 1)
    return weights


class Released:
    def __init__(self, weights, diffusion_depth, ar_length, use_clean_blocks=True, use_condition=True, local_denoising=False):
        self.weights, self.blocks, self.has_text = weights, ar_length, "embed_tokens.weight" in weights
        self.depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.ar_depth, self.local = self.depth - diffusion_depth, local_denoising
        self.use_clean, self.use_condition = use_clean_blocks, use_condition
        self.tokens = weights["boi_block"].shape[1]
        self.unet = unet_blocks()
        for name, block in self.unet.items():
            state = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
            block.double().eval().load_state_dict(state)

    # ---- U-Net

    def time(self, half, t):
        first, second = (self.weights[f"{half}.time_embedding.linear_{i}.weight"] for i in (1, 2))
        return F.linear(F.silu(F.linear(t.double()[:, None], first)), second)

    def conv(self, name, x):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=1)

    def embed(self, latents, t):
        batch = len(latents)
        x, emb = latents.flatten(0, 1), self.time("downsampler", t.flatten())
        x = self.conv("downsampler.conv_in", x)
        skips = (x,)
        for level in (0, 1):
            x, more = self.unet[f"downsampler.down_blocks.{level}"](x, emb)
            skips += more
        x = self.conv("downsampler.conv_out", x)
        return x.flatten(2).transpose(1, 2).reshape(batch, -1, x.shape[1]), skips

    def unembed(self, tokens, t, skips):
        batch, side = len(tokens), math.isqrt(self.tokens)
        x = tokens.reshape(batch * self.blocks, self.tokens, -1).transpose(1, 2).unflatten(2, (side, side))
        emb = self.time("upsampler", t.flatten())
        x = self.conv("upsampler.conv_in", x)
        for level in (0, 1):
            x = self.unet[f"upsampler.up_blocks.{level}"](x, skips[-3:], emb)
            skips = skips[:-3]
        return self.conv("upsampler.conv_out", x).unflatten(0, (batch, self.blocks))

    # ---- the sequence

    def image_angles(self):
        rows, side = math.isqrt(self.blocks), math.isqrt(self.tokens)
        base = (math.floor(math.floor(8 * rows * side / math.pi) / 100) + 1) * 100
        frequencies = base ** -(torch.linspace(0, HEAD, HEAD // 4, dtype=torch.float64) / HEAD)
        angles = []
        for block in range(self.blocks):
            for token in range(self.tokens):
                row = block // rows * side + token // side
                column = block % rows * side + token % side
                angles.append(torch.cat([row * frequencies, row * frequencies, column * frequencies, column * frequencies]))
        return torch.stack(angles)

    def text_angles(self, tokens):
        frequencies = 10_000 ** -(2 * torch.arange(HEAD // 2, dtype=torch.float64) / HEAD)
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles, angles], dim=1)

    def mask(self, kinds, places, local):
        """Who sees whom: kinds 0 text, 1 clean, 2 noisy; places of text tokens, or blocks."""
        kinds, places = torch.tensor(kinds), torch.tensor(places)
        kind, place, other, there = kinds[:, None], places[:, None], kinds[None], places[None]
        text = (other == 0) & ((kind != 0) | (there <= place))
        earlier = (kind != 0) & (other == (1 if self.use_clean else 2)) & (there < place)
        itself = (kind != 0) & (kind == other) & (place == there)
        return text | itself if local else text | itself | earlier

    def layer(self, number, parts, angles, sees):
        """parts: (tower's number, residual stream [B, P, D])."""
        queries, keys, values = [], [], []
        for tower, x in parts:
            at = f"blocks.{number}.self_attn"
            x = norm(x, self.weights[f"blocks.{number}.input_layernorm_list.{tower}.weight"], 1e-5)
            qkv = F.linear(x, self.weights[f"{at}.qkv_list.{tower}.weight"], self.weights[f"{at}.qkv_list.{tower}.bias"])
            q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).unbind(2)
            queries.append(norm(q, self.weights[f"{at}.q_norm_list.{tower}.weight"], 1e-6))
            keys.append(norm(k, self.weights[f"{at}.k_norm_list.{tower}.weight"], 1e-6))
            values.append(v)
        q, k = (rotate(torch.cat(x, dim=1), angles) for x in (queries, keys))
        scores = torch.einsum("bqhk,bmhk->bhqm", q, k) / math.sqrt(HEAD)
        weights = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("bhqm,bmhk->bqhk", weights, torch.cat(values, dim=1)).flatten(2)
        result = []
        for (tower, stream), part in zip(parts, attended.split([x.shape[1] for _, x in parts], dim=1), strict=True):
            at, mlp = f"blocks.{number}.self_attn.proj_list.{tower}", f"blocks.{number}.mlp_list.{tower}"
            x = stream + F.linear(part, self.weights[f"{at}.weight"], self.weights[f"{at}.bias"])
            y = norm(x, self.weights[f"blocks.{number}.post_attention_layernorm_list.{tower}.weight"], 1e-5)
            gate, up = (F.linear(y, self.weights[f"{mlp}.{name}_proj.weight"]) for name in ("gate", "up"))
            result.append((tower, x + F.linear(F.silu(gate) * up, self.weights[f"{mlp}.down_proj.weight"])))
        return result

    def forward(self, clean, noisy, t, text=None, clean_t=None):
        batch, text_tokens = len(clean), 0 if text is None else text.shape[1]
        clean_t = t if clean_t is None else clean_t
        embedded, clean_skips = self.embed(clean, clean_t)
        boi = self.weights["boi_block"].expand(batch, -1, -1)
        shifted = torch.cat([boi, embedded[:, : -self.tokens]], dim=1)
        first = int(self.has_text)
        blocks = [block for block in range(self.blocks) for _ in range(self.tokens)]
        parts, kinds, places = [], [], []
        if self.has_text:
            parts.append((0, F.embedding(text, self.weights["embed_tokens.weight"])))
            kinds, places = [0] * text_tokens, list(range(text_tokens))
        if self.use_clean:
            parts.append((first, embedded))
            kinds, places = kinds + [1] * len(blocks), places + blocks
        parts.append((first + 1, shifted))
        kinds, places = kinds + [2] * len(blocks), places + blocks
        image = self.image_angles()
        angles = torch.cat([self.text_angles(text_tokens), image, *([image] if self.use_clean else [])])
        for number in range(self.ar_depth):
            parts = self.layer(number, parts, angles, self.mask(kinds, places, local=False))
        tokens, skips = self.embed(noisy, t)
        parts[-1] = (first + 1, tokens + parts[-1][1] if self.use_condition else tokens)
        for number in range(self.ar_depth, self.depth):
            parts = self.layer(number, parts, angles, self.mask(kinds, places, self.local))
        outputs = {"denoised_BLCYX": self.unembed(parts[-1][1], t, skips)}
        if self.use_clean:
            outputs["clean_tower_BLCYX"] = self.unembed(parts[-2][1], clean_t, clean_skips)
        if self.has_text:
            outputs["text_logits"] = F.linear(parts[0][1], self.weights["lm_head.weight"])
        return outputs

    def sample(self, text, noise, steps=2):
        """Finished blocks are embedded at the last timestep; without clean blocks they are read as they were there."""
        clean, noisy = torch.zeros_like(noise), torch.zeros_like(noise)
        for block in range(self.blocks):
            process = scheduler()
            process.set_timesteps(steps)
            last = process.timesteps[-1]
            x = noise[:, block]
            for t in process.timesteps:
                noisy[:, block] = x
                times = torch.full(noise.shape[:2], int(last))
                clean_times = times.clone()
                times[:, block] = t
                predicted = self.forward(clean, noisy, times, text, clean_times)["denoised_BLCYX"][:, block]
                x = process.step(predicted, t, x).prev_sample
            clean[:, block] = x
        return clean


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, angles):
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos()[:, None] + torch.cat([-second, first], dim=-1) * angles.sin()[:, None]

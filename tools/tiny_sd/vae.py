"""Stage: the autoencoder, 64x64 pictures to 4x8x8 latents that are white once scaled as SD1.x scales them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .loop import adamw, numpy_generator, run_steps, torch_generator
from .pictures import draw_pictures, sample_drawings, to_unit

__all__ = ["SCALING_FACTOR", "train_vae"]

logger = logging.getLogger(__name__)

SCALING_FACTOR = 0.18215  # SD1.x's; trainers hard-code it
_STREAM = 2  # of the seed
_PICTURES = 8000
_KL_WEIGHT = 1e-5  # per latent number, against errors per pixel; at 1e-3 two of the four channels die, and colour with them
_EDGE_WEIGHT = 0.5
_LATENT_NOISE = 0.1  # of the latents' std, added in the last two fifths of the steps: the decoder forgives a U-Net small errors
_WHITENING_FLOOR = 1e-4  # of the largest principal variance
_SPREAD = 0.01  # of the posterior, once latents have unit variance


def build_vae() -> AutoencoderKL:
    """Four levels as SD1.x's, 16 to 64 wide: 1.0 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
    )


def train_vae(work: Path, seed: int, steps: int, batch: int = 8) -> AutoencoderKL:
    """Train on every texture: like SD's, the autoencoder must show what only a LoRA will ask for; the U-Net never sees them."""
    torch.manual_seed(seed)
    vae = build_vae()
    pictures = draw_pictures(sample_drawings(_PICTURES, numpy_generator(seed, _STREAM), texture=None))
    optimizer = adamw(vae, lr=2e-3)

    def take_step(step: int) -> float:
        generator = torch_generator(seed, _STREAM, step)
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        target = to_unit(pictures[chosen]) * 2 - 1
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        spread = posterior.std + (_LATENT_NOISE * posterior.mean.detach().std() if step >= 0.6 * steps else 0)
        drawn = vae.decode(posterior.mean + spread * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = drawn - target
        pixels = (_weigh_pixels(target) * (error.abs() + error.square())).mean()
        loss = pixels + _EDGE_WEIGHT * _edge_error(drawn, target) + _KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    run_steps("vae", steps, take_step, {"vae": vae}, optimizer, work)
    vae.eval()
    _fold_whitening(vae, pictures[:2000])
    return vae


def _weigh_pixels(target: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) weights that let the shape count as much as the (far larger) background: colours come sooner."""
    shape = ((target - target[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.1).float()  # the corner is background
    share = shape.mean(dim=(2, 3), keepdim=True).clamp(min=0.02)
    return 0.5 + 0.5 * shape / share


def _edge_error(drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of the differences between neighbouring pixels: what a blurred edge gets wrong."""
    return F.l1_loss(drawn.diff(dim=-1), target.diff(dim=-1)) + F.l1_loss(drawn.diff(dim=-2), target.diff(dim=-2))


@torch.no_grad()
def _fold_whitening(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents zero mean and covariance I / SCALING_FACTOR^2, by changing the two 1x1 convolutions only.

    z' = A (z - mean), A = U diag(1 / sqrt(lambda + floor)) U^T / SCALING_FACTOR over the eigenvalues of the covariance. Without it
    brightness, in all four channels, drowns hue, which the U-Net then learns last. Pictures come out as before.
    """
    latents = torch.cat([vae.encode(to_unit(part) * 2 - 1).latent_dist.mean for part in pictures.split(100)])
    flat = latents.transpose(0, 1).flatten(1).double()  # (4, pixels)
    mean, (values, vectors) = flat.mean(dim=1), torch.linalg.eigh(torch.cov(flat))
    logger.info("vae: latents had mean %s and principal variances %s", mean.tolist(), values.tolist())
    gains = (values + _WHITENING_FLOOR * values.max()).rsqrt() / SCALING_FACTOR
    forth, back = vectors * gains @ vectors.T, vectors / gains @ vectors.T  # (4, 4): A and its inverse
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:4, :, 0, 0].double(), quant.bias[:4].double()
    quant.weight[:4, :, 0, 0] = (forth @ weight).float()
    quant.bias[:4] = (forth @ (bias - mean)).float()
    quant.weight[4:] = 0  # the spread, a hundredth, cannot turn with the axes: it becomes a constant
    quant.bias[4:] = 2 * math.log(_SPREAD / SCALING_FACTOR)
    post.bias += (post.weight[:, :, 0, 0].double() @ mean).float()
    post.weight[:, :, 0, 0] = (post.weight[:, :, 0, 0].double() @ back).float()

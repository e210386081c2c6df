"""The FLUX MMDiT in PyTorch, as a peer to time ours against: what a careful user of PyTorch would write today.

Projections are fused as FLUX stores them (`qkv`; a single block's `linear1` and `linear2`), attention is
`scaled_dot_product_attention`, each kind of block is compiled once (`torch.compile`) and may be recomputed in the
backward pass. Rotations are made once and not at every step. Formulas: `acejax.model.mmdit`, which it is held against
(`benchmarks.gpu_check`).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acejax.model.config import MMDiTConfig

# BFL's names (`acejax.weights.keymaps`), of which these are other ones for the same tensors.
RENAMED = (("(img|txt)_(attn|mod|mlp)", r"\1"), (r"\b(mod|modulation)\.lin\b", "modulation"),
           (r"\b(img|txt)\.lin\b", r"\1.modulation"), (r"\bnorm\.(query|key)_norm\.scale", r"\1_norm"),
           (r"\b(img|txt)\.0\b", r"\1.mlp_in"), (r"\b(img|txt)\.2\b", r"\1.mlp_out"),
           (r"adaLN_modulation\.1", "modulation"))


class Linear(nn.Linear):
    """A linear layer, beside which `adapt` puts a low-rank pair: a [r, in], b [out, r]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_parameter("a", None)
        self.register_parameter("b", None)

    def adapt(self, rank: int) -> None:
        where = self.weight.device
        self.a = nn.Parameter(torch.empty(rank, self.in_features, device=where).uniform_(-1, 1)
                              / math.sqrt(self.in_features))
        self.b = nn.Parameter(torch.zeros(self.out_features, rank, device=where))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.a is None else y + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class Embedder(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = Linear(inputs, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, then (1 + scale) x + shift, in float32; shift and scale are [B, 1, D]."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return ((1 + scale.float()) * normed + shift.float()).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[2n], x[2n + 1]) of [B, heads, S, head_dim], in float32; cos and sin are [S, head_dim / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), -1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, heads, S, head_dim] each -> [B, S, D]."""
    out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    return out.transpose(1, 2).flatten(2)


class Heads(nn.Module):
    """What both kinds of blocks have: the norms of queries and keys, in a block of so many heads."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.heads = config.num_heads
        self.query_norm, self.key_norm = (nn.Parameter(torch.ones(config.head_dim)) for _ in range(2))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, 3 D] -> queries, keys, values [B, heads, S, head_dim]."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return rms_norm(q, self.query_norm), rms_norm(k, self.key_norm), v


class Stream(Heads):
    """One of a double block's two streams."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        width = config.hidden_size
        self.modulation, self.qkv, self.proj = Linear(width, 6 * width), Linear(width, 3 * width), Linear(width, width)
        self.mlp_in, self.mlp_out = Linear(width, config.mlp_size), Linear(config.mlp_size, width)

    def before(self, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(self.qkv(modulated_norm(x, *made.chunk(6, -1)[:2])))

    def after(self, x: Tensor, made: Tensor, attended: Tensor) -> Tensor:
        gate, shift, scale, mlp_gate = made.chunk(6, -1)[2:]
        x = x + gate * self.proj(attended)
        y = self.mlp_in(modulated_norm(x, shift, scale))
        return x + mlp_gate * self.mlp_out(F.gelu(y, approximate="tanh"))


class DoubleBlock(nn.Module):
    """Two streams, one attention over both; text comes first."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.img, self.txt = Stream(config), Stream(config)

    def modulate(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.txt.modulation(vec), self.img.modulation(vec)

    def forward(self, text: Tensor, image: Tensor, of_text: Tensor, of_image: Tensor, cos: Tensor, sin: Tensor
                ) -> tuple[Tensor, Tensor]:
        pairs = zip(self.txt.before(text, of_text), self.img.before(image, of_image), strict=True)
        attended = attend(*(torch.cat(pair, 2) for pair in pairs), cos, sin)
        first, second = attended.split((text.shape[1], image.shape[1]), 1)
        return self.txt.after(text, of_text, first), self.img.after(image, of_image, second)


class SingleBlock(Heads):
    """One stream; attention and MLP beside each other, in two products."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        width, hidden = config.hidden_size, config.mlp_size
        self.parts = (3 * width, hidden)
        self.modulation = Linear(width, 3 * width)
        self.linear1, self.linear2 = Linear(width, 3 * width + hidden), Linear(width + hidden, width)

    def modulate(self, vec: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation(vec),)

    def forward(self, x: Tensor, made: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = made.chunk(3, -1)
        qkv, mlp = self.linear1(modulated_norm(x, shift, scale)).split(self.parts, -1)
        attended = attend(*self.split(qkv), cos, sin)
        return x + gate * self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), -1))


class FinalLayer(nn.Module):
    """Modulated norm, then the projection to velocity tokens."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.hidden_size
        self.modulation, self.linear = Linear(width, 2 * width), Linear(width, config.out_channels)

    def modulate(self, vec: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation(vec),)

    def forward(self, x: Tensor, made: Tensor) -> Tensor:
        return self.linear(modulated_norm(x, *made.chunk(2, -1)))


Made = list[tuple[Tensor, ...]]  # of each layer, the vectors [B, 1, n D] that modulate it


class MMDiT(nn.Module):
    """The model. `recompute` keeps only the blocks' inputs for the backward pass."""

    recompute = False

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width = config.hidden_size
        self.axes, self.theta, self.has_guidance = config.axes_dim, config.theta, config.guidance_embed
        self.img_in, self.txt_in = Linear(config.in_channels, width), Linear(config.context_in_dim, width)
        self.time_in, self.vector_in = Embedder(256, width), Embedder(config.vec_in_dim, width)
        if self.has_guidance:
            self.guidance_in = Embedder(256, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)

    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.double_blocks, *self.single_blocks, self.final_layer)

    def modulations(self, sigma: Tensor, pooled: Tensor, guidance: Tensor | None) -> Made:
        """From noise level [B], pooled text [B, P] and guidance [B]."""
        def wave(t: Tensor) -> Tensor:
            frequencies = torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=t.device))
            angles = 1000 * t.float()[:, None] * frequencies
            return torch.cat((angles.cos(), angles.sin()), -1).to(pooled.dtype)

        vec = self.time_in(wave(sigma)) + self.vector_in(pooled)
        if self.has_guidance:
            vec = vec + self.guidance_in(wave(guidance))
        vec = F.silu(vec)[:, None]
        return [layer.modulate(vec) for layer in self.layers()]

    def rotations(self, positions: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """cos and sin [text + S, head_dim / 2] of positions [S, 3]; text sits at 0."""
        positions = F.pad(positions, (0, 0, text, 0)).double()
        angles = torch.cat([positions[:, axis, None] / self.theta ** (
            torch.arange(0, size, 2, device=positions.device).double() / size)
            for axis, size in enumerate(self.axes)], -1)
        return angles.cos().float(), angles.sin().float()

    def forward(self, image: Tensor, text: Tensor, rope: tuple[Tensor, Tensor], made: Made) -> Tensor:
        """Image tokens [B, S, C] and text [B, T, E] -> velocity [B, S, out_channels]."""
        image, text = self.img_in(image), self.txt_in(text)
        size, depth = text.shape[1], len(self.double_blocks)
        for block, of_block in zip(self.double_blocks, made, strict=False):
            text, image = self._run(block, text, image, *of_block, *rope)
        x = torch.cat((text, image), 1)
        for block, of_block in zip(self.single_blocks, made[depth:], strict=False):
            x = self._run(block, x, *of_block, *rope)
        return self.final_layer(x[:, size:], *made[-1])

    def _run(self, block: nn.Module, *inputs: Tensor):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def compile_layers(self, mode: str) -> None:
        """One program for each kind of layer: all layers of a kind share it."""
        for layer in self.layers():
            layer.compile(mode=mode, dynamic=False)


def own_name(key: str) -> str:
    """The peer's name of a tensor that BFL's layout calls `key`."""
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def load(model: MMDiT, tensors: Mapping[str, Tensor]) -> None:
    """Weights by BFL's names; every one must be there."""
    model.load_state_dict({own_name(key): tensor for key, tensor in tensors.items()}, strict=True)


def adapt(model: MMDiT, rank: int) -> list[nn.Parameter]:
    """Freeze the model and put a pair beside every linear layer of its blocks (304 of FLUX's): the pairs' factors."""
    model.requires_grad_(False)
    adapted = [module for blocks in (model.double_blocks, model.single_blocks) for module in blocks.modules()
               if isinstance(module, Linear)]
    for module in adapted:
        module.adapt(rank)
    return [factor for module in adapted for factor in (module.a, module.b)]


def loss(model: MMDiT, batch: Mapping[str, Tensor], noise: Tensor, sigma: Tensor, rope: tuple[Tensor, Tensor]
         ) -> Tensor:
    """Velocity matching as ACE++ trains: guidance 1, a plain mean."""
    level, target = sigma[:, None, None], batch["target"].float()
    noisy = (1 - level) * target + level * noise
    dtype = model.img_in.weight.dtype
    image = torch.cat((noisy.to(dtype), batch["edit"], batch["modify"], (batch["mask"] / 255).to(dtype)), -1)
    made = model.modulations(sigma, batch["pooled"], torch.ones_like(sigma))
    velocity = model(image, batch["text"], rope, made)
    return F.mse_loss(velocity.float(), noise - target)


class Adafactor:
    """Adafactor of one parameter after the other, each as soon as its gradient is there, which is then thrown away.

    bfloat16 is rounded up or down at random, so that the mean is exact. Formulas: `acejax.train.adafactor`.
    """

    def __init__(self, model: nn.Module, rate: float, weight_decay: float,
                 compiled: Callable[[Callable], Callable] = lambda function: function):
        self.rate, self.weight_decay, self.step, self._matrix = rate, weight_decay, 0, compiled(move_matrix)
        self._moments = {}
        for parameter in model.parameters():
            self._moments[parameter] = [parameter.new_zeros(shape, dtype=torch.float32) for shape in (
                parameter.shape[:1], parameter.shape[1:])] if factored(parameter) else [
                    torch.zeros_like(parameter, dtype=torch.float32)]
            parameter.register_post_accumulate_grad_hook(self._move)

    def begin(self) -> None:
        """Before each backward pass."""
        self.step += 1
        where = next(iter(self._moments)).device
        self._decay = torch.tensor(1 - self.step**-0.8, device=where)

    @torch.no_grad()
    def _move(self, parameter: Tensor) -> None:
        move = self._matrix if factored(parameter) else move_vector
        move(parameter, parameter.grad, *self._moments[parameter], self._decay, self.rate, self.weight_decay)
        parameter.grad = None


def factored(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) >= 128


def move_matrix(parameter: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor, decay: Tensor, rate: float,
                weight_decay: float) -> None:
    gradient = gradient.float()
    squared = gradient.square() + 1e-30
    rows.lerp_(squared.mean(1), 1 - decay)
    columns.lerp_(squared.mean(0), 1 - decay)
    direction = gradient * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()
    _apply(parameter, direction, rate, weight_decay)


def move_vector(parameter: Tensor, gradient: Tensor, moment: Tensor, decay: Tensor, rate: float, weight_decay: float
                ) -> None:
    gradient = gradient.float()
    moment.lerp_(gradient.square() + 1e-30, 1 - decay)
    _apply(parameter, gradient * moment.rsqrt(), rate, weight_decay)


def _apply(parameter: Tensor, direction: Tensor, rate: float, weight_decay: float) -> None:
    direction = direction / direction.square().mean().sqrt().clamp(min=1)
    wide = parameter.float()
    wide = wide - rate * (direction + weight_decay * wide)
    if parameter.dtype == torch.bfloat16:
        bits = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device)
        wide = ((wide.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32)
    parameter.copy_(wide)

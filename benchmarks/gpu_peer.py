"""PyTorch's side of `benchmarks.gpu` (`benchmarks.torch_mmdit`): compiled blocks, the fastest attention it has here."""

import functools
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from acejax.model.config import MMDiTConfig
from benchmarks import gpu_inputs, torch_mmdit
from benchmarks.gpu_side import LEVELS, RANK, Ready, Work

BATCHES = 3
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def denoise(work: Work) -> Ready:
    """As ours; `others` times the step that makes its modulation itself, as pipelines of PyTorch do."""
    config, model, attention = _prepare(work, training=False)
    size = gpu_inputs.grid(work.tokens)
    drawn = gpu_inputs.batch(config, work.samples, size, work.text, jnp.bfloat16, 0)
    given = gpu_inputs.to_torch(drawn, DEVICE)
    sigmas = torch.from_numpy(np.linspace(1, 0, LEVELS + 1, dtype=np.float32)).to(DEVICE)
    rope, guidance = model.rotations(given["positions"][0], work.text), torch.full((work.samples,), 4.0, device=DEVICE)
    latents = torch.randn(given["target"].shape, device=DEVICE)
    conditions = torch.cat((given["edit"], given["modify"], (given["mask"] / 255).to(torch.bfloat16)), -1)

    def modulations(level: int) -> torch_mmdit.Made:
        return model.modulations(sigmas[level].expand(work.samples), given["pooled"], guidance)

    @torch.inference_mode()
    def euler(level: int, made: torch_mmdit.Made) -> torch.Tensor:
        nonlocal latents
        image = torch.cat((latents.to(torch.bfloat16), conditions), -1)
        velocity = model(image, given["text"], rope, made)
        latents = latents + (sigmas[level + 1] - sigmas[level]) * velocity
        _synchronize()
        return latents

    with torch.inference_mode():
        made = [modulations(level) for level in range(LEVELS)]

    def each_time(number: int) -> torch.Tensor:
        with torch.inference_mode():
            return euler(number % LEVELS, modulations(number % LEVELS))

    return _ready(lambda number: euler(number % LEVELS, made[number % LEVELS]), attention | {
        "modulation": "beforehand"}, {"modulation_in_step": each_time})


def train_lora(work: Work) -> Ready:
    """Float32 pairs on a frozen bfloat16 base, clipped by norm, fused AdamW."""
    config, model, facts = _prepare(work, training=True)
    rank = min(RANK, config.hidden_size)
    factors = torch_mmdit.adapt(model, rank)
    optimizer = torch.optim.AdamW(factors, 1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=CUDA)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(factors, 1.0, foreach=CUDA)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _training(work, model, facts | {"base": "bfloat16", "rank": rank, "optimizer": "AdamW, float32 factors"},
                     lambda: None, update)


def train_full(work: Work) -> Ready:
    """Adafactor as each gradient comes (a hook), bfloat16 with stochastic rounding: no gradient is kept."""
    _, model, facts = _prepare(work, training=True)
    compiled = functools.partial(torch.compile, dynamic=False) if CUDA else lambda function: function
    optimizer = torch_mmdit.Adafactor(model, 1e-5, 0.01, compiled)
    return _training(work, model, facts | {"optimizer": "Adafactor, bfloat16, stochastic rounding, fused"},
                     optimizer.begin, lambda: None)


def _training(work: Work, model: torch_mmdit.MMDiT, facts: dict[str, Any], begin: Any, update: Any) -> Ready:
    model.recompute = work.remat != "none"
    batches = [gpu_inputs.to_torch(gpu_inputs.batch(work.config, work.samples, gpu_inputs.grid(work.tokens), work.text,
                                                    jnp.bfloat16, seed), DEVICE) for seed in range(BATCHES)]
    rope = model.rotations(batches[0]["positions"][0], work.text)

    def step(number: int) -> torch.Tensor:
        batch = batches[number % BATCHES]
        noise, sigma = torch.randn(batch["target"].shape, device=DEVICE), torch.randn(work.samples, device=DEVICE)
        begin()
        loss = torch_mmdit.loss(model, batch, noise, sigma.sigmoid(), rope)
        loss.backward()
        update()
        _synchronize()
        return loss.detach()

    return _ready(step, facts | {"remat": "full" if model.recompute else "none"})


def _prepare(work: Work, training: bool) -> tuple[MMDiTConfig, torch_mmdit.MMDiT, dict[str, Any]]:
    """Random bfloat16 weights made on the device, blocks compiled, attention chosen for good."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = torch_mmdit.MMDiT(work.config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("_norm") else 0.0, gpu_inputs.SIZE)
    facts = {"attention": "torch's choice", "torch_compile": "off"}
    if CUDA:
        torch._dynamo.config.recompile_limit = 64  # Adafactor is compiled for each shape of a matrix
        model.compile_layers(work.torch_compile)
        facts = {"attention": fastest_attention(work, training), "torch_compile": work.torch_compile}
    return work.config, model, facts


def fastest_attention(work: Work, training: bool) -> str:
    """Tries cuDNN's and flash attention at the size in question; the faster one is what all that follows uses."""
    shape = (work.samples, work.config.num_heads, work.text + work.tokens, work.config.head_dim)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=training) for _ in range(3))
    cotangent, seconds = torch.randn_like(q), {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                for _ in range(10):  # the last one counts
                    _synchronize()
                    began = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, v)
                    if training:
                        out.backward(cotangent)
                    _synchronize()
                    seconds[backend] = time.perf_counter() - began
        except RuntimeError as error:
            print(f"{backend.name}: {error}", flush=True)
    best = min(seconds, key=seconds.get)
    torch.backends.cuda.enable_cudnn_sdp(best is SDPBackend.CUDNN_ATTENTION)
    torch.backends.cuda.enable_flash_sdp(best is SDPBackend.FLASH_ATTENTION)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)  # rather an error than what is slower by far
    return best.name


def _synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _ready(step: Any, facts: dict[str, Any], others: Any = None) -> Ready:
    return Ready(step, torch.cuda.get_device_name() if CUDA else None,
                 lambda: torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0, facts, others or {},
                 warmed=torch.cuda.reset_peak_memory_stats if CUDA else lambda: None)


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


PARTS = {"step": denoise, "lora": train_lora, "fused": train_full}

"""PyTorch's side of the training benchmark. Run without jaxlm, asked by lines:

    python train_torch.py [--compile]

The same models as plain modules, as well as PyTorch does them: `scaled_dot_product_attention`,
fused AdamW, bfloat16 by autocast with parameters in float32, and `torch.compile` if asked for.
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))
from answering import answer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """A pre-norm layer: attention and feed-forward."""

    def __init__(self, c: dict):
        super().__init__()
        d, heads, kv, size = c["d_model"], c["num_heads"], c["num_kv_heads"], c["head_dim"]
        self.sizes = [heads * size, kv * size, kv * size]
        self.head_dim, self.gated = size, c["mlp"] == "swiglu"
        self.attention_norm, self.mlp_norm = norm(c), norm(c)
        self.qkv = nn.Linear(d, sum(self.sizes), bias=c["biases"])
        self.out = nn.Linear(heads * size, d, bias=c["biases"])
        self.up = nn.Linear(d, c["d_ff"] * (2 if self.gated else 1), bias=c["biases"])
        self.down = nn.Linear(c["d_ff"], d, bias=c["biases"])

    def forward(self, x, angles):
        """[B, T, D] to the same."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(self.sizes, -1)
        )
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.up(self.mlp_norm(x))
        if self.gated:
            gate, y = y.chunk(2, -1)
            return x + self.down(F.silu(gate) * y)
        return x + self.down(F.gelu(y, approximate="tanh"))


class Model(nn.Module):
    """GPT-2 or Llama: tokens [B, T] to logits."""

    def __init__(self, c: dict):
        super().__init__()
        self.embed = nn.Embedding(c["vocab_size"], c["d_model"])
        self.positions = None
        if c["positions"] == "learned":
            self.positions = nn.Embedding(c["seq_len"], c["d_model"])
        else:
            half = torch.arange(c["head_dim"] // 2) / (c["head_dim"] // 2)
            angles = torch.arange(c["seq_len"])[:, None] * c["rope_theta"] ** -half[None, :]
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_layers"]))
        self.final_norm = norm(c)
        self.head = nn.Linear(c["d_model"], c["vocab_size"], bias=False)
        if c["tie_embeddings"]:
            self.head.weight = self.embed.weight

    def forward(self, tokens, targets):
        """The mean cross-entropy."""
        x, angles = self.embed(tokens), None
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        else:
            angles = self.cos, self.sin
        for layer in self.layers:
            x = layer(x, angles)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def norm(c: dict) -> nn.Module:
    """The normalisation that the model has."""
    kind = nn.RMSNorm if c["norm"] == "rmsnorm" else nn.LayerNorm
    return kind(c["d_model"], eps=c["norm_eps"])


def turn(x, angles):
    """Rotary positions, in float32."""
    cos, sin = angles
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).type_as(x)


def load(model: Model, path: str) -> None:
    """Take jaxlm's weights."""
    found = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    state = {"embed.weight": found["embed/embedding"]}
    if "positions/embedding" in found:
        state["positions.weight"] = found["positions/embedding"]
    state["head.weight"] = (
        found["head/kernel"].T if "head/kernel" in found else state["embed.weight"]
    )
    for kind in ("weight", "bias"):
        source = "scale" if kind == "weight" else "bias"
        if f"final_norm/{source}" in found:
            state[f"final_norm.{kind}"] = found[f"final_norm/{source}"]
    parts = {"qkv": ["attention/q", "attention/k", "attention/v"], "out": ["attention/out"]}
    parts |= {"up": ["mlp/gate", "mlp/up"] if "layers/mlp/gate/kernel" in found else ["mlp/up"]}
    parts |= {"down": ["mlp/down"]}
    for i in range(len(model.layers)):
        width = found["embed/embedding"].shape[1]
        for name, sources in parts.items():
            kernels = [found[f"layers/{s}/kernel"][i] for s in sources]
            # Only the attention's output has two dimensions that it sums over.
            flat = [k.flatten(0, -2) if name == "out" else k.flatten(1) for k in kernels]
            assert name != "qkv" or flat[0].shape[0] == width
            state[f"layers.{i}.{name}.weight"] = torch.cat(flat, 1).T
            if f"layers/{sources[0]}/bias" in found:
                biases = [found[f"layers/{s}/bias"][i].flatten() for s in sources]
                state[f"layers.{i}.{name}.bias"] = torch.cat(biases)
        for name in ("attention_norm", "mlp_norm"):
            state[f"layers.{i}.{name}.weight"] = found[f"layers/{name}/scale"][i]
            if f"layers/{name}/bias" in found:
                state[f"layers.{i}.{name}.bias"] = found[f"layers/{name}/bias"][i]
    model.load_state_dict(state)


class Trainer:
    """A model, its optimiser and a batch."""

    def __init__(self, c: dict, compiled: bool, weights: str | None = None):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("highest")
        self.model = Model(c)
        for parameter in self.model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        if weights is not None:
            load(self.model, weights)
        self.model.to(DEVICE)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
            lr=c["learning_rate"],
            betas=(c["beta1"], c["beta2"]),
            eps=c["eps"],
            weight_decay=c["weight_decay"],
            fused=True,
        )
        self.clip, self.bf16 = c["clip_norm"], c["dtype"] == "bfloat16"
        self.loss = torch.compile(self.model) if compiled else self.model
        rng = np.random.default_rng(0)
        shape = c["batch_size"], c["seq_len"] + 1
        tokens = torch.from_numpy(rng.integers(0, c["vocab_size"], shape)).to(DEVICE)
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self, count: int) -> float:
        """Take steps; the loss before the last of them."""
        for _ in range(count):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(self.tokens, self.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Side:
    """What answers."""

    def __init__(self, compiled: bool):
        self.compiled = compiled
        self.trainer = None

    def check(self, settings: dict, weights: str, count: int) -> dict:
        """The losses of the first steps from jaxlm's initial weights."""
        trainer = Trainer(settings, False, weights)
        return {"losses": [trainer.step(1) for _ in range(count)]}

    def setup(self, settings: dict) -> dict:
        """Build and compile; what the model is, and how long that took."""
        started = time.monotonic()
        self.trainer = Trainer(settings, self.compiled)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.trainer.step(1)
        return {
            "compile_seconds": time.monotonic() - started,
            "parameters": sum(p.numel() for p in self.trainer.model.parameters()),
            "versions": {"torch": torch.__version__},
        }

    def steps(self, count: int) -> dict:
        """Take steps and time them."""
        started = time.monotonic()
        self.trainer.step(count)
        return {"seconds": time.monotonic() - started}

    def memory(self) -> dict:
        """Peak bytes: of the device or, on a CPU, resident."""
        if DEVICE == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated()}
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


if __name__ == "__main__":
    answer(Side("--compile" in sys.argv))

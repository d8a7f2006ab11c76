"""Training and decoding by PyTorch beside the measured load: `python -m benchmarks.gpu.torch_load`.

Rates of a ResNet-50 step, of a step of a small GPT and of its decoding, one token at a time; then it trains the GPT
until it is ended (`item`: its loss is read after every step).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn


class Gpt(nn.Module):  # type: ignore[misc]  # torch is not installed where this is checked
    """Twelve layers of 768, as GPT-2's smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50304, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(768, 50304)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of `tokens`."""
        found: torch.Tensor = self.head(self.layers(self.embed(tokens)))
        return found


def _training(model: nn.Module, batch: torch.Tensor, wanted: torch.Tensor, item: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(batch).flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if item:
            loss.item()

    return step


def _rate(step: Callable[[], None], seconds: float) -> float:
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        count += 5
    return count / (time.perf_counter() - began)


def main(out: str, seconds: float, item: bool) -> None:
    """Write the rates to `out`, then train until ended."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 224, 224, device="cuda")
    resnet = torchvision.models.resnet50().cuda()
    labels = torch.randint(0, 1000, (64,), device="cuda")
    gpt = Gpt().cuda()
    tokens = torch.randint(0, 50304, (8, 512), device="cuda")

    @torch.no_grad()
    def decode() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            gpt(tokens[:1, :1])

    training = _training(gpt, tokens, tokens, item)
    rates = {
        "resnet50_steps_per_second": _rate(_training(resnet, images, labels, item), seconds),
        "gpt_steps_per_second": _rate(training, seconds),
        "gpt_tokens_per_second": _rate(decode, seconds),
    }
    Path(out).write_text(json.dumps(rates))
    while True:
        training()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3] == "item")

"""How an iteration begins: the injection of the prelude's output, and the noise of a first state.

Shapes: B batch, T tokens, D width.
"""

import math

import torch
from torch import nn

from .configuration_recurrent import RecurrentConfig

# Start of the mix coefficient where nobody chose one: SmolLM2's layers loop best near it.
DEFAULT_MIXING = 0.25


class Injection(nn.Module):
    """Feeds the prelude's output into an iteration: (s, e), each (B, T, D), to (B, T, D)."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.kind = config.injection
        if self.kind == "mix":
            self.mixing = nn.Parameter(torch.empty(config.hidden_size))
        elif self.kind == "linear":
            self.weight = nn.Parameter(torch.empty(config.hidden_size, 2 * config.hidden_size))

    @torch.no_grad()
    def initialize(self, mixing: float = DEFAULT_MIXING) -> None:
        """Start as ``e + mixing * (s - e)``, which is e itself where s = e."""
        if self.kind == "mix":
            self.mixing.fill_(mixing)
        elif self.kind == "linear":
            eye = torch.eye(
                self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device
            )
            self.weight.copy_(torch.cat([mixing * eye, (1 - mixing) * eye], dim=1))

    def forward(self, s_BTD: torch.Tensor, e_BTD: torch.Tensor) -> torch.Tensor:
        """Combine the state with the prelude's output."""
        if self.kind == "mix":
            # Written around e, so that s = e gives e to the last bit whatever the coefficient.
            return e_BTD + self.mixing * (s_BTD - e_BTD)
        if self.kind == "linear":
            return nn.functional.linear(torch.cat([s_BTD, e_BTD], dim=-1), self.weight)
        return s_BTD + e_BTD


def positional_noise(
    position_ids: torch.Tensor, width: int, std: float, seed: int | torch.Tensor
) -> torch.Tensor:
    """Truncated normal noise that depends on the seed, the position and the channel only.

    Cached decoding, another batch or another padding thus meet the noise that the whole sequence
    met. The counter is hashed by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).

    Args:
        position_ids: Positions, (B, T).
        width: D.
        std: Standard deviation before truncation at three of them.
        seed: One seed, or one per row (B,).

    Returns:
        Noise of shape (B, T, D) in float32.
    """
    seed_B = torch.as_tensor(seed, device=position_ids.device).reshape(-1, 1, 1)
    channel = torch.arange(width, device=position_ids.device)
    # Odd multipliers spread seed, position and channel over the 64 bits; int64 wraps as wanted.
    z = seed_B * 0x632BE59BD9B4E019 + position_ids[..., None] * 0x2545F4914F6CDD1D + channel
    z = z * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    uniform = (((z >> 40) & 0xFFFFFF).float() + 0.5) / 2**24
    inside_three_std = math.erf(3 / math.sqrt(2))
    return std * math.sqrt(2) * torch.erfinv((2 * uniform - 1) * inside_three_std)

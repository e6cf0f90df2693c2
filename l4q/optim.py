"""AdamW with its two moments in float32, in bfloat16, or in 8 bits where a library offers that.

Moments in bfloat16 must be rounded stochastically: the second one changes by at most 0.1 % a step (beta2 = 0.999),
which is less than half of bfloat16's spacing (0.4 to 0.8 %), so rounded to nearest it would never shrink again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from l4q.distributed import is_sharded_tensor, own_rows
from l4q.errors import UnsupportedError
from l4q.train_options import OptimState

MOMENTS = ("exp_avg", "exp_avg_sq")
# package -> module with its AdamW8bit; the first one installed is used
EIGHT_BIT = {"bitsandbytes": "bitsandbytes.optim"}


class Bf16AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update in float32, its moments kept in bfloat16 between steps.

    The rounding noise depends on a parameter's step and position only: a resumed run rounds alike, so do the processes
    of a parallel one, sharded or not, and no other random number changes.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        position = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, position)
                position += 1
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore a saved state; torch casts moments to the parameters' dtype, which is undone (exactly) here."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in MOMENTS:
                state[key] = state[key].to(torch.bfloat16)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], position: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        rows = own_rows(parameter)
        value, grad = rows.tensor, own_rows(parameter.grad).tensor  # type: ignore[arg-type]
        mean, square = (own_rows(state[key]).tensor for key in MOMENTS)
        beta1, beta2 = group["betas"]
        first = mean.to(value.dtype).lerp_(grad, 1 - beta1)
        second = square.to(value.dtype).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (second.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        value.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))
        generator = torch.Generator(value.device).manual_seed(state["step"] * 1_000_003 + position)
        for stored, exact in ((mean, first), (square, second)):
            # of the whole tensor: the rows of another process would take other numbers otherwise
            noise = random_bits(parameter.shape, generator)
            stored.copy_(round_stochastic(exact, noise[rows.start : rows.start + exact.shape[0]]))


def random_bits(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Noise for `round_stochastic`: int32 numbers below 2**16, on the generator's device."""
    return torch.randint(0, 1 << 16, tuple(shape), dtype=torch.int32, device=generator.device, generator=generator)


def round_stochastic(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round to one of the two nearest bfloat16 values, up with the probability of the distance; right on average.

    Adding 16 random bits below bfloat16's last one carries into it exactly that often.
    """
    bits = values.to(torch.float32).view(torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def make_optimizer(
    groups: list[dict[str, Any]], state: OptimState, *, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their own lr and weight_decay.

    Raises:
        UnsupportedError: 8-bit moments without a library that has them.
    """
    optimizer: torch.optim.Optimizer = OPTIMIZERS[state](groups, betas=betas, eps=eps)
    return optimizer


def _eight_bit(groups: list[dict[str, Any]], **settings: Any) -> Any:
    found = next((module for package, module in EIGHT_BIT.items() if find_spec(package)), None)
    if found is None:
        raise UnsupportedError(
            "8-bit optimizer states need another library",
            where="optim_state",
            got=f"none of {list(EIGHT_BIT)} is installed",
            expected="bitsandbytes, whose AdamW8bit is used",
            remedy="pip install 'l4q[8bit]' (bitsandbytes), or use --optim-state bfloat16",
        )
    if any(is_sharded_tensor(parameter) for group in groups for parameter in group["params"]):
        raise UnsupportedError(
            "8-bit optimizer states cannot be sharded",
            where="optim_state",
            got=f"a model sharded by --fsdp; {found} keeps its states per whole tensor",
            remedy="use --optim-state bfloat16, or leave --fsdp out",
        )
    return import_module(found).AdamW8bit(groups, **settings)


OPTIMIZERS: dict[OptimState, Callable[..., Any]] = {
    "float32": torch.optim.AdamW,
    "bfloat16": Bf16AdamW,
    "8bit": _eight_bit,
}

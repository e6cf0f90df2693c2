"""transformers integration: `AutoModelForCausalLM.from_pretrained(checkpoint)`, to generate or to train adapters on.

Uses transformers' public hooks (register_quantization_config, register_quantizer). Each linear keeps its codes and
dequantizes in the forward, so a loaded model needs the checkpoint's memory, not the float model's; nor does training
an adapter on it keep float weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from l4q.bitpack import row_bytes, unpack_codes
from l4q.checkpoint import QUANT_METHOD
from l4q.config import FORMAT_VERSION, QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.k_grids import SUPERBLOCK
from l4q.module_grids import MODULES_KEY, module_grids


class L4QConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The quantization_config section of an L4Q checkpoint's config.json."""

    def __init__(self, modules_to_not_convert: list[str] | None = None, **values: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = values.get("format_version", FORMAT_VERSION)
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.grid = QuantConfig.from_dict(values, where="quantization_config")
        self.modules = module_grids(values, where="quantization_config")

    def grid_of(self, module: str) -> QuantConfig:
        """The grid of one linear module."""
        return self.modules.get(module, self.grid)

    def to_dict(self) -> dict[str, Any]:
        """The section as written to config.json."""
        own = {"quant_method": QUANT_METHOD, "format_version": self.format_version}
        section = {**own, **self.grid.to_dict(), "modules_to_not_convert": self.modules_to_not_convert}
        grids = {module: grid.to_dict() for module, grid in self.modules.items()}
        return {**section, MODULES_KEY: grids} if grids else section


class PackedWeight:
    """What a packed layer has in place of a float weight: its shape, dtype of computing and device, and no values.

    Raises:
        UnsupportedError: Anything else is asked of it, such as `data`, into which adapters are merged.
    """

    _is_hf_initialized = True  # transformers' mark of a tensor that it need not initialize

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedError(
            "an L4Q layer holds trained integers; it has no float weight to read, change or merge an adapter into",
            where=f"PackedLinear.weight.{name}",
            remedy="keep the adapter beside the checkpoint, call model.dequantize() before you merge, or train inside "
            "the quantizer with l4q-train",
        )


class PackedProduct(torch.autograd.Function):
    """y = x @ W^T with the W that a packed layer dequantizes, once more in backward instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        """X [..., in] -> [..., out] in x's dtype."""
        ctx.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        """The gradient of x alone: the layer's integers are frozen."""
        return grads[0] @ ctx.layer.dequantize().to(grads[0].dtype), None


class PackedLinear(nn.Linear):
    """A linear layer that holds an L4Q checkpoint's tensors and dequantizes them in every forward.

    It is a torch.nn.Linear to those who look for one, as PEFT does, but its `weight` has no values: merging an adapter
    into it would have to round the trained integers anew.

    Buffers-like parameters: codes uint8 [out, row_bytes], scales float16 [out, groups], zeros uint8 or mins float16
    [out, groups]; bias in the model's dtype. On a K grid scales and mins are [out, superblocks], beside sub_scales and
    sub_mins uint8 [out, groups].
    """

    def __init__(self, linear: nn.Linear, quant: QuantConfig) -> None:
        nn.Module.__init__(self)  # torch.nn.Linear's own would make the weight
        self.quant = quant
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group_size = quant.resolve_group_size(self.in_features)
        grouped = (self.out_features, self.in_features // self.group_size)
        self.codes = self._frozen((self.out_features, row_bytes(self.in_features, quant.bits)), torch.uint8)
        shared = grouped if quant.k_grid is None else (self.out_features, self.in_features // SUPERBLOCK)
        self.scales = self._frozen(shared, torch.float16)
        if quant.zero_point == "integer":
            self.zeros = self._frozen(grouped, torch.uint8)
        if quant.zero_point == "float":
            self.mins = self._frozen(shared, torch.float16)
        if quant.k_grid is not None:
            self.sub_scales = self._frozen(grouped, torch.uint8)
            if quant.zero_point == "float":
                self.sub_mins = self._frozen(grouped, torch.uint8)
        self.bias = linear.bias
        self._dtype = linear.weight.dtype

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """Shape, dtype and device of the weight, without its values."""
        return PackedWeight((self.out_features, self.in_features), self._dtype, self.codes.device)

    @staticmethod
    def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [out, in] by `QuantizedWeight`'s equation."""
        codes = unpack_codes(self.codes.cpu().numpy(), self.in_features, self.quant.bits)
        flat = torch.from_numpy(codes).to(self.scales.device)
        grouped = flat.view(self.out_features, -1, self.group_size).float()  # [out, groups, group_size]
        scales = self._group_values("scales")
        if self.quant.zero_point == "float":
            return (grouped * scales + self._group_values("mins")).view(self.out_features, -1)
        zeros = self.zeros.float().unsqueeze(-1) if self.quant.zero_point == "integer" else self.quant.midpoint
        return ((grouped - zeros) * scales).view(self.out_features, -1)

    def _group_values(self, part: str) -> torch.Tensor:
        """Scales or mins of every group, float32 [out, groups, 1]."""
        values: torch.Tensor = getattr(self, part).float()
        if self.quant.k_grid is not None:
            values = values.repeat_interleave(self.quant.k_grid.groups, dim=1) * getattr(self, f"sub_{part}").float()
        return values.unsqueeze(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in] -> [..., out]."""
        y: torch.Tensor = PackedProduct.apply(x, self)
        bias = cast("nn.Parameter | None", self.bias)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and grid for print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.quant.bits}, group_size={self.group_size}"


class L4QHfQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Swaps linears for `PackedLinear` before transformers loads the weights."""

    requires_calibration = True  # only trained checkpoints can be loaded; there is no on-the-fly quantization

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = set(config.modules_to_not_convert)
        linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n not in skip}
        for name, linear in linears.items():
            grid = config.grid_of(name)
            if linear.in_features % grid.resolve_group_size(linear.in_features):
                raise UsageError(
                    "the group size does not divide in_features",
                    where=name,
                    got=f"{linear.in_features} / {grid.group_size}",
                    remedy="name the module in quantization_config.modules_to_not_convert if it is dense",
                )
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PackedLinear(linear, grid))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, packed in [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]:
            linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
            linear.weight = nn.Parameter(packed.dequantize().to(dtype or torch.float32), requires_grad=False)
            linear.bias = packed.bias
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A loaded checkpoint can be saved again with save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the integers themselves are frozen."""
        return True


def register() -> None:
    """Make transformers know quant_method "l4q"; harmless when repeated."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(L4QConfig)
        register_quantizer(QUANT_METHOD)(L4QHfQuantizer)


register()

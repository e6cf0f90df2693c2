"""vLLM's own Python packers on exported folders, in a process of their own: python vllm_packers.py FOLDER... .

vllm/model_executor/layers/quantization/utils/quant_utils.py is what vLLM's kernel tests pack and unpack weights with.
Writes codes.safetensors into each folder: uint8 [out, in] per module. For AWQ there is a packer only: where it puts a
column's bits is where they are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

WIDTHS = {2: scalar_types.uint2b2, 4: scalar_types.uint4b8}


def gptq(words: torch.Tensor, bits: int) -> np.ndarray:
    """qweight [K * bits / 32, N] to codes [N, K]."""
    return unpack_quantized_values_into_int32(words, WIDTHS[bits], packed_dim=0).T.numpy()


def compressed_tensors(words: torch.Tensor, bits: int) -> np.ndarray:
    """weight_packed [N, K * bits / 32] to codes [N, K]."""
    return unpack_quantized_values_into_int32(words, WIDTHS[bits], packed_dim=1).numpy()


def awq(words: torch.Tensor, bits: int) -> np.ndarray:
    """qweight [K, N / 8] to codes [N, K]: where awq_pack puts each of the 8 columns of a word, it is read from."""
    rows, columns = words.shape[0], words.shape[1] * 8
    codes = np.zeros((rows, columns), dtype=np.int64)
    unsigned = words.numpy().view(np.uint32)
    for column in range(8):
        probe = torch.zeros(1, 8, dtype=torch.int32)
        probe[0, column] = 1
        shift = int(awq_pack(probe, bits, 1, 8).item()).bit_length() - 1
        codes[:, column::8] = (unsigned >> np.uint32(shift)) & 15
    return codes.T


UNPACK = {"qweight": gptq, "weight_packed": compressed_tensors}


def main() -> None:
    """Decode FORMAT:BITS:FOLDER arguments."""
    for argument in sys.argv[1:]:
        name, bits, folder = argument.split(":", 2)
        codes = {}
        for tensor, words in load_file(Path(folder) / "model.safetensors").items():
            module, _, part = tensor.rpartition(".")
            if part in UNPACK:
                unpack = awq if name == "awq" else UNPACK[part]
                codes[module] = torch.from_numpy(np.ascontiguousarray(unpack(words, int(bits)), dtype=np.uint8))
        save_file(codes, Path(folder) / "codes.safetensors")


if __name__ == "__main__":
    main()

"""What everybody else does: quantize a float GGUF file anew, by ggml's formulas as gguf-py implements them bit for bit.

Serves as the yardstick for how noisy a block type is in llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter


def requantize(source: Path, target: Path, kind: str) -> int:
    """Copy a float32 GGUF file with every block linear quantized; embeddings, norms and head stay as they are.

    Returns:
        The number of quantized tensors.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        is_array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(
            field.name, field.contents(), field.types[0], sub_type=field.types[-1] if is_array else None
        )
    block_type, count = GGMLQuantizationType[kind], 0
    for tensor in reader.tensors:
        values = np.asarray(tensor.data)
        if tensor.name.startswith("blk.") and values.ndim == 2:
            writer.add_tensor(tensor.name, gguf.quantize(values, block_type), raw_dtype=block_type)
            count += 1
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count

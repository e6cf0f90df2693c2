"""ONNX: standard operators, 4-bit DequantizeLinear blocks that ONNX Runtime turns into MatMulNBits.

The package is `exporters.onnx`; a plain `import onnx` is still the onnx library.
"""

from __future__ import annotations

from exporters.onnx.plan import plan
from exporters.onnx.read import read_back
from exporters.onnx.write import write

__all__ = ["plan", "read_back", "usage", "write"]


def usage() -> str:
    """Markdown for the model card: how to load the folder, and what the accuracy level does."""
    return USAGE


USAGE = """\
```python
import onnxruntime as ort

options = ort.SessionOptions()
level = "0"  # 0: float32 activations (exact). 4: int8 activations (ONNX Runtime's own default, faster, less accurate)
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
session = ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
print(session.get_modelmeta().custom_metadata_map["l4q.accuracy_level"])  # the level this folder was made for
```

Inputs: `input_ids` and `attention_mask` (int64, `[batch, length]` and `[batch, past + length]`, left padding allowed)
and `past_key_values.<layer>.key|value` (float32, `[batch, kv_heads, past, head_dim]`; start with `past = 0`).
Outputs: `logits` and `present.<layer>.key|value`, the next step's past. Needs ONNX Runtime 1.24 or newer;
`model.onnx.data` must stay beside `model.onnx`.

**Set the accuracy level.** A session made without the option computes at level 4: faster on CPUs with int8
instructions, at the price of 0.2 to 1.3 % perplexity. A model file cannot choose it; onnxruntime-genai takes the
level from `genai_config.json`.
"""

"""compressed-tensors folders (pack-quantized) for vLLM: symmetric and asymmetric, on CPU and GPU."""

from __future__ import annotations

from exporters.compressed_tensors.plan import plan
from exporters.compressed_tensors.read import read_back
from exporters.compressed_tensors.write import write

__all__ = ["plan", "read_back", "usage", "write"]


def usage() -> str:
    """Markdown for the model card: serving with vLLM and loading with transformers."""
    return """\
vLLM:

```sh
python -m vllm.entrypoints.openai.api_server --model . --dtype float16 --host 127.0.0.1
```

On a CPU, set `VLLM_CPU_KVCACHE_SPACE` (GiB) first: vLLM otherwise asks for nearly all memory.

transformers, with `compressed-tensors` installed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="float16")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""

"""AWQ folders (AutoAWQ's "gemm" layout) for vLLM: 4-bit codes with zero-points, packed along out_features."""

from __future__ import annotations

from exporters.awq.plan import plan
from exporters.awq.read import read_back
from exporters.awq.write import write

__all__ = ["plan", "read_back", "usage", "write"]


def usage() -> str:
    """Markdown for the model card: serving with vLLM and loading with transformers."""
    return """\
vLLM:

```sh
python -m vllm.entrypoints.openai.api_server --model . --dtype float16 --host 127.0.0.1
```

On a CPU, set `VLLM_CPU_KVCACHE_SPACE` (GiB) first: vLLM otherwise asks for nearly all memory.

transformers, with `gptqmodel` installed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="float16", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""

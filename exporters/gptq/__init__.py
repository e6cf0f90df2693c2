"""GPTQ folders for vLLM, GPTQModel and transformers: 4-bit (or dense 2- and 3-bit) codes, v1 or v2 zeros."""

from __future__ import annotations

from exporters.gptq.plan import plan
from exporters.gptq.write import read_back, write

__all__ = ["plan", "read_back", "usage", "write"]


def usage() -> str:
    """Markdown for the model card: serving with vLLM and loading with transformers."""
    return """\
vLLM (symmetric checkpoints, `"sym": true` in config.json):

```sh
python -m vllm.entrypoints.openai.api_server --model . --dtype float16 --host 127.0.0.1
```

On a CPU, set `VLLM_CPU_KVCACHE_SPACE` (GiB) first: vLLM otherwise asks for nearly all memory.

transformers, with `optimum` and `gptqmodel` installed:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="float16", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""

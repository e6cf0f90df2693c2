"""GGUF for llama.cpp: trained integers packed into Q4_0, Q4_1, Q5_0, Q4_K or Q3_K blocks without requantization."""

from __future__ import annotations

from exporters.gguf.plan import plan
from exporters.gguf.read import read_back
from exporters.gguf.write import write

__all__ = ["plan", "read_back", "usage", "write"]


def usage() -> str:
    """Markdown for the model card: how to load the folder in llama.cpp."""
    return """Load the `.gguf` file with llama.cpp or anything built on it:

```bash
llama-cli -m *.gguf -p "Hello"
llama-server -m *.gguf --host 127.0.0.1
```

Ollama takes the `Modelfile` beside it, LM Studio imports the file into its folder of models:

```bash
ollama create my-model -f Modelfile && ollama run my-model
lms import *.gguf --user-repo me/my-model
```

From Python, with `pip install xllamacpp`:

```python
import glob
import xllamacpp as xlc

params = xlc.CommonParams()
params.model.path = glob.glob("*.gguf")[0]
params.n_ctx = 2048
server = xlc.Server(params)
print(server.handle_chat_completions({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}))
```
"""

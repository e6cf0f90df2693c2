"""onnxruntime-genai as an engine of runtime_tests.engines: greedy generation with the seconds of its decode steps.

Imports numpy and onnxruntime-genai only, so that it runs in a worker without the project.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og


class Engine:
    """One folder with a genai_config.json.

    Args:
        model: The folder.
        intra_op_threads: Compute threads.
    """

    def __init__(self, model: str, intra_op_threads: int = 2) -> None:
        config = og.Config(model)
        options = {"intra_op_num_threads": intra_op_threads, "log_id": "l4q"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)

    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy ids, as many as asked for, and the seconds spent after the first of them."""
        params = og.GeneratorParams(self._model)
        length = len(token_ids) + max_new_tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(token_ids, dtype=np.int32))
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(max_new_tokens - 1):
            generator.generate_next_token()
        seconds = time.perf_counter() - started
        return [int(token) for token in generator.get_sequence(0)][len(token_ids) :], seconds

    def info(self) -> dict[str, Any]:
        """Runtime and version."""
        return {"runtime": "onnxruntime-genai", "version": og.__version__}

    def close(self) -> None:
        """Release the model."""
        del self._model

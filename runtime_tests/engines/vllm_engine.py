"""vLLM in this process, on CPU or GPU, fed token ids.

vLLM reports top-k prompt logprobs; parity needs the whole row. So the model's `compute_logits` is wrapped: for one
prompt in one prefill step vLLM calls it for the last position (to sample) and for all positions before (prompt
logprobs), and the logits of both calls are the full answer. Every call is checked against the numbers vLLM itself
reports for the prompt.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

# vLLM and the capture take log_softmax of the same fp16 logits in float32; only the summation order may differ.
CAPTURE_TOLERANCE = 1e-4


def context_length(folder: Path, otherwise: int) -> int:
    """The longest sequence config.json says the model reads; `otherwise` if it does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or otherwise)


class Engine:
    """One vLLM model with eager execution, no prefix cache and one sequence at a time.

    Args:
        model: Folder with config.json and weights; no tokenizer is needed.
        dtype: Activation dtype; vLLM's int4 kernels take float16 and bfloat16.
        max_model_len: Longest prompt plus answer in tokens, cut to the model's context; a prompt is always one prefill
            step.
        tensor_parallel: Ranks the model is split over, each a process of its own. With more than one the rows are those
            that vLLM reports, which is slow, because nothing can be wrapped in other processes.
    """

    def __init__(
        self, model: str, *, dtype: str = "float16", max_model_len: int = 1024, tensor_parallel: int = 1
    ) -> None:
        from vllm import LLM

        max_model_len = min(max_model_len, context_length(Path(model), max_model_len))
        self._llm = LLM(
            model,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_model_len,
            max_num_seqs=1,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            seed=0,
            tensor_parallel_size=tensor_parallel,
            max_logprobs=-1,
        )
        self._ranks = tensor_parallel
        self._stop_ids = stop_ids(Path(model))
        self._requests = itertools.count()
        self._capturing = False
        self._captured: list[torch.Tensor] = []
        self._kernels: dict[str, int] = {}
        if tensor_parallel == 1:
            self._llm.apply_model(self._attach)
        self._deviation = 0.0

    def prompt_logprobs(self, token_ids: list[int]) -> np.ndarray:
        """float32 [len(token_ids), vocab]: row t = log p(. | token_ids[: t + 1]).

        Raises:
            RuntimeError: The captured rows disagree with vLLM's own prompt logprobs.
        """
        from vllm import SamplingParams

        if self._ranks > 1:
            everything = SamplingParams(
                temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False
            )
            return reported_rows(self._run(token_ids, everything)[0])
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        self._captured.clear()
        self._capturing = True
        try:
            output, _ = self._run(token_ids, params)
        finally:
            self._capturing = False
        rows = join_captured(self._captured, len(token_ids))
        self._captured.clear()
        reported = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]
        self._deviation = max(self._deviation, check_reported(rows, token_ids, reported))
        return rows

    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy new ids, the stop token included, and the seconds spent after the first of them."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=self._stop_ids, detokenize=False
        )
        output, seconds = self._run(token_ids, params)
        return [int(token) for token in output.outputs[0].token_ids], seconds

    def info(self) -> dict[str, str | int | float]:
        """Version, dtype, the kernels of the linear layers and the capture's largest deviation from vLLM's numbers."""
        import vllm

        config = self._llm.llm_engine.model_config
        return {
            "runtime": "vllm",
            "version": vllm.__version__,
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": str(config.quantization),
            "kernels": json.dumps(self._kernels, sort_keys=True),
            "capture_deviation": self._deviation,
            "tensor_parallel": self._ranks,
        }

    def close(self) -> None:
        """Free the model, the KV cache and the process groups, so that another model can load."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        self._captured.clear()
        cleanup_dist_env_and_memory()
        gc.collect()

    def _run(self, token_ids: list[int], params: Any) -> tuple[Any, float]:
        """Finish one request; seconds count from the step that gave the first new token."""
        engine = self._llm.llm_engine
        engine.add_request(str(next(self._requests)), {"prompt_token_ids": token_ids}, params)
        started, output = 0.0, None
        while engine.has_unfinished_requests():
            outputs = engine.step()
            output = outputs[0] if outputs else output
            if started == 0.0 and output is not None:
                started = time.perf_counter()
        return output, time.perf_counter() - started

    def _attach(self, model: Any) -> None:
        compute_logits = model.compute_logits

        def compute_and_capture(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = compute_logits(*args, **kwargs)
            if self._capturing:
                self._captured.append(logits.detach().float().cpu())
            return logits

        model.compute_logits = compute_and_capture
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if method is not None:
                # compressed-tensors keeps its kernel in the layer's scheme
                kernel = getattr(method, "kernel", None) or getattr(getattr(layer, "scheme", None), "kernel", method)
                name = type(kernel).__name__
                self._kernels[name] = self._kernels.get(name, 0) + 1


def join_captured(captured: list[torch.Tensor], tokens: int) -> np.ndarray:
    """Log-probabilities float32 [tokens, vocab] from one step's logits: first the last position's, then all before it.

    Raises:
        RuntimeError: The calls do not cover the prompt once.
    """
    shapes = [tuple(part.shape) for part in captured]
    if sum(shape[0] for shape in shapes) != tokens or shapes[0][0] != 1 or len(captured) > 2:
        raise RuntimeError(
            f"vLLM computed logits in calls of {shapes}, expected the last of {tokens} rows, then the rest"
        )
    return torch.log_softmax(torch.cat([*captured[1:], captured[0]]), dim=-1).numpy()


def reported_rows(output: Any) -> np.ndarray:
    """float32 [tokens, vocab] from a request that asked for the log-probabilities of the whole vocabulary."""
    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows], dtype=np.float32)


def check_reported(rows: np.ndarray, token_ids: list[int], reported: list[float]) -> float:
    """The largest |captured - reported| over the prompt's own tokens.

    Raises:
        RuntimeError: It exceeds CAPTURE_TOLERANCE.
    """
    if not reported:
        return 0.0
    ours = rows[np.arange(len(reported)), token_ids[1:]]
    deviation = float(np.abs(ours - np.asarray(reported, dtype=np.float32)).max())
    if not deviation <= CAPTURE_TOLERANCE:
        raise RuntimeError(
            f"captured logprobs differ from vLLM's own by {deviation:g}, expected <= {CAPTURE_TOLERANCE:g}"
        )
    return deviation


def stop_ids(folder: Path) -> list[int]:
    """End-of-sequence ids of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if value is not None:
            return [value] if isinstance(value, int) else list(value)
    return []

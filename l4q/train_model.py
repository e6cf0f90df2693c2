"""The model of a run: loaded as the options say, and wrapped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from l4q.calibrate import Moments, input_moments
from l4q.data import TrainingData
from l4q.errors import UnsupportedError, UsageError
from l4q.guards import first_line, foreign
from l4q.init import Start
from l4q.model import WrapReport, l4q_layers, wrap_linears
from l4q.model_folder import check_folder, check_size
from l4q.rules import split_siblings
from l4q.sharding import hollow_model, reads_weights
from l4q.starts import open_start
from l4q.starts.hub import dense_folder
from l4q.starts.match import fit_scale_grid
from l4q.tokenizers import read_tokenizer, require_tokenizer
from l4q.train_options import TrainOptions

log = logging.getLogger(__name__)


def load_model(options: TrainOptions) -> tuple[Any, Any]:
    """The model, in the dtype asked for, and its tokenizer.

    Raises:
        UsageError: The folder or model id does not exist or is incomplete.
        UnsupportedError: transformers knows no causal language model for it.
    """
    start, trusted = open_start(options.model), options.trust_remote_code
    if start is not None:
        log.info("%s: a %s start", start.path, start.format)
        model, tokenizer = start.load(getattr(torch, options.dtype))
        return model, require_tokenizer(tokenizer, start.path)
    path = Path(options.model)
    looks_local = path.is_absolute() or options.model.startswith((".", "~")) or len(path.parts) > 2
    if looks_local and not path.is_dir():
        raise UsageError("the model folder does not exist", where=options.model, expected="a Hugging Face model folder")
    try:
        folder = path if path.is_dir() else dense_folder(options.model, trust_remote_code=trusted)
        if folder is not None:
            check_folder(folder, trust_remote_code=trusted)
        source, dtype = str(folder or options.model), getattr(torch, options.dtype)
        model = _dense_model(options, source, dtype) if reads_weights(options.fsdp) else hollow_model(source, dtype)
        model.config.name_or_path = options.model  # not its folder in the hub's cache
        tokenizer = read_tokenizer(source, trust_remote_code=trusted)
    except OSError as error:
        raise UsageError(
            "the model cannot be loaded",
            where=options.model,
            got=first_line(error),
            expected="a folder with config.json, safetensors and tokenizer, or a model id of the hub",
        ) from error
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(
            "transformers cannot load this as a causal language model",
            where=options.model,
            got=first_line(error),
            expected="an architecture of AutoModelForCausalLM",
        ) from error
    return model, require_tokenizer(tokenizer, options.model)


def _dense_model(options: TrainOptions, source: str, dtype: torch.dtype) -> Any:
    """The model from the safetensors of `source`; code that comes with it runs only if the options say so.

    Raises:
        UsageError: The config is not that of the weights: tensors are missing or of another shape.
    """
    trusted, path = options.trust_remote_code, Path(source)
    if trusted:
        log.warning("%s: Python code that comes with the model runs (--trust-remote-code)", options.model)
    with foreign("transformers cannot load this model", where=options.model, passed=(OSError, ValueError, ImportError)):
        if path.is_dir():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
            with torch.device("meta"):
                check_size(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted), path)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trusted,
            use_safetensors=True,
            output_loading_info=True,
        )
    wrong = {key: sorted(map(str, info[key]))[:5] for key in ("missing_keys", "mismatched_keys") if info[key]}
    if wrong:  # transformers would fill them with random numbers
        raise UsageError(
            "the folder's tensors are not those of its architecture",
            where=options.model,
            got=wrong,
            expected=type(model).__name__,
            remedy="copy the whole folder again",
        )
    return model


def wrap_model(
    model: Any,
    options: TrainOptions,
    data: TrainingData | None = None,
    found: Mapping[str, Start] | None = None,
) -> WrapReport:
    """Wrap the linears of a loaded model as these options say.

    Args:
        model: As `load_model` returns it.
        options: Of the run.
        data: What it trains on, for init "calibrated"; without it that init weighs all columns alike.
        found: s and b that init "reconstructed" has found for the weights that the model holds.

    Raises:
        UsageError: The options do not fit the model, see `wrap_linears`.
    """
    start, quant = open_start(options.model), options.quant
    if start is not None:
        start.attach(model)
        quant = fit_scale_grid((grid for grid in map(start.grid, start.modules()) if grid is not None), quant)
    if quant != options.quant:
        log.info("scale_grid %s, as %s does not hold the start's scales", quant.scale_grid, options.quant.scale_grid)
    report = wrap_linears(
        model,
        quant,
        options.lora,
        init=options.start_init,
        learning=options.learning,
        skip_indivisible=options.leave_dense,
        start=start,
        storage=options.base_storage,
        moments=_moments(model, options, data),
        found=found,
        overrides=options.overrides,
        skip=options.skip,
        quantize_head=options.quantize_head,
        kernels=options.kernels,
    )
    for line in report.describe_start():
        log.info("%s", line)
    for grid, count in Counter(layer.quant for _, layer in l4q_layers(model)).items() if options.overrides else ():
        log.info("%d layers: %s", count, ", ".join(f"{key} {value}" for key, value in grid.to_dict().items()))
    sizes = {name: layer.quant.group_size for name, layer in l4q_layers(model)}
    for layer in split_siblings({**dict.fromkeys(report.dense), **sizes}):
        log.warning("%s: vLLM fuses these, so exports to gptq, awq and compressed-tensors will be refused", layer)
    return report


def _moments(model: Any, options: TrainOptions, data: TrainingData | None) -> Moments:
    if options.start_init != "calibrated" or data is None:
        return {}
    chosen = data.spread(cast(int, options.calibration))
    log.info("calibrating the grid on %d sequences", len(chosen))
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return input_moments(model, names, chosen)

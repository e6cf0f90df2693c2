"""`l4q-train`: options to `TrainOptions`, result to stdout. Torch and transformers load only when training starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from l4q.cli_command import command_line, print_json
from l4q.cli_common import run
from l4q.config import (
    SUPPORTED_BITS,
    BaseStorage,
    GradientScale,
    GridLearning,
    Init,
    KernelChoice,
    LoraConfig,
    QuantConfig,
    ScaleGrid,
    ZeroPoint,
)
from l4q.rules import Override
from l4q.train_options import Amp, EvalOptions, OptimOptions, OptimState, Reporter, TrainDtype, TrainOptions

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
RESULT_LINES = {
    "checkpoint": "checkpoint",
    "steps": "steps",
    "first_loss": "loss, first steps",
    "final_loss": "loss, last steps",
}


@command_line(
    "train",
    examples=(
        "l4q-train HuggingFaceTB/SmolLM2-135M-Instruct --data my_texts.txt --out RUN",
        "l4q-train MODEL --data chats.jsonl --bits 3 --steps 400 --out RUN \\\n"
        "--eval-text held_out.txt --eval-every 50",
        "l4q-train --config run.yaml --out RUN --resume",
    ),
    interrupted="--resume continues from the newest saved state",
)
@click.argument("model")
@click.option("--data", type=FILE, multiple=True, required=True, help="One or more .txt, .jsonl or .json files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder; RUN/checkpoint is the result.")
@click.option("--bits", type=click.Choice([str(bits) for bits in SUPPORTED_BITS]), default="4", help="Bits per weight.")
@click.option("--group-size", type=int, default=64, help="Columns that share a scale; -1 = one group per row.")
@click.option("--zero-point", type=click.Choice(get_args(ZeroPoint)), default="none", help="Kind of zero-point.")
@click.option(
    "--scale-grid",
    type=click.Choice(get_args(ScaleGrid)),
    help="Scale values; q4_k, q3_k: llama.cpp's.  [default: by --zero-point]",
)
@click.option(
    "--init",
    type=click.Choice(get_args(Init)),
    help="How scales and offsets start.  [default: calibrated, with --fsdp l4q]",
)
@click.option(
    "--calibration",
    type=int,
    help="Training sequences for --init calibrated and reconstructed.  [default: 16, reconstructed: 128]",
)
@click.option("--reconstruct-epochs", type=int, default=2, help="Passes over them per block with --init reconstructed.")
@click.option(
    "--reconstruct-settle", metavar="SHARE", type=float, default=0.5, help="How far its W0 is drawn towards its codes."
)
@click.option("--train-scales/--no-train-scales", default=True, help="Whether the scales train.")
@click.option("--train-offsets/--no-train-offsets", default=True, help="Whether the offsets train, if there are any.")
@click.option("--move-base", is_flag=True, help="Let W0 keep its codes when the grid moves; with --init reconstructed.")
@click.option(
    "--gradient-scale",
    type=click.Choice(get_args(GradientScale)),
    default="none",
    help="Factor on the gradients of scales and offsets; lsq = 1 / sqrt(weights per group * Q_P).",
)
@click.option(
    "--lora-warmup-steps", type=int, default=0, help="First steps that train plain LoRA; then quantization starts."
)
@click.option(
    "--distill", type=float, default=0.0, help="Share of the loss that is the divergence from the unquantized MODEL."
)
@click.option("--leave-dense", is_flag=True, help="Leave layers dense that the group size or a K grid does not fit.")
@click.option("--target-modules", multiple=True, default=("*",), help="fnmatch pattern on module names; repeatable.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN:FIELD=VALUE,...",
    help="Another grid for the layers a pattern matches (bits, group_size, zero_point, scale_grid); repeatable, the "
    "first that matches holds.",
)
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave the layers a pattern matches dense; repeatable.")
@click.option("--quantize-head", is_flag=True, help="Quantize the output head too, if it is not the embedding matrix.")
@click.option("--rank", type=int, default=8, help="LoRA rank.")
@click.option("--alpha", type=float, default=16.0, help="LoRA scaling is alpha / rank.")
@click.option("--dropout", type=float, default=0.0, help="LoRA dropout probability.")
@click.option("--lr", type=float, default=1e-3, help="Peak learning rate of LoRA's A and B.")
@click.option("--scale-lr", type=float, help="Peak learning rate of the scales.  [default: lr / 20]")
@click.option("--offset-lr", type=float, help="Peak learning rate of the offsets.  [default: lr / 20]")
@click.option("--weight-decay", type=float, default=0.01, help="On A and B only.")
@click.option("--warmup-ratio", type=float, default=0.1, help="Share of the steps spent warming up.")
@click.option("--max-grad-norm", type=float, default=1.0, help="Clip gradients to this norm; 0 = off.")
@click.option(
    "--optim-state",
    type=click.Choice(get_args(OptimState)),
    default="float32",
    help="How AdamW keeps its moments; 8bit needs bitsandbytes.",
)
@click.option("--steps", type=int, help="Optimizer steps.  [default: one epoch]")
@click.option("--epochs", type=float, help="Passes over the data, instead of --steps.")
@click.option("--batch-size", type=int, default=1, help="Sequences per forward pass.")
@click.option("--grad-accum", type=int, default=1, help="Forward passes per optimizer step.")
@click.option("--max-length", type=int, help="Tokens per sequence.  [default: 1024, at most the model's context]")
@click.option("--seed", type=int, default=0, help="Seed of LoRA's A, data order and dropout.")
@click.option("--dtype", type=click.Choice(get_args(TrainDtype)), default="float32", help="Dtype of the frozen model.")
@click.option(
    "--amp",
    type=click.Choice(get_args(Amp)),
    default="none",
    help="bfloat16 = autocast: float32 weights, bfloat16 products.",
)
@click.option(
    "--base-storage",
    type=click.Choice(get_args(BaseStorage)),
    default="dense",
    help="Keep the frozen weights dense, in 8- or 4-bit blocks, or as the integers of a pre-quantized MODEL.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, one more forward pass.")
@click.option(
    "--kernels", type=click.Choice(get_args(KernelChoice)), default="auto", help="auto: numba on CPU, triton on CUDA."
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with MODEL. Read it first.")
@click.option("--fsdp", is_flag=True, help="Under torchrun or accelerate launch: shard the model, do not copy it.")
@click.option("--save-every", type=int, default=100, help="Steps between saved states.")
@click.option("--keep-states", type=int, default=2, help="Saved states to keep.")
@click.option("--resume", is_flag=True, help="Continue the run in --out, or start it if there is none.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out first.")
@click.option("--eval-text", type=FILE, help="Held-out text; perplexity before and after training.")
@click.option("--eval-window", type=int, help="Tokens per window.  [default: 512, at most the model's context]")
@click.option("--eval-windows", type=int, default=12, help="Number of windows.")
@click.option("--eval-every", type=int, help="Steps between perplexities of --eval-text in training.  [default: never]")
@click.option(
    "--report-to", type=click.Choice(get_args(Reporter)), multiple=True, default=("none",),
    help="Also send the figures of every step there, through the Trainer's own callback; repeatable.",
)  # fmt: skip
def command(as_json: bool, **values: Any) -> None:
    """Fine-tune MODEL with L4Q and freeze it to --out/checkpoint.

    MODEL is a Hugging Face folder or id, pre-quantized by GPTQ, AWQ or compressed-tensors or not, or a GGUF file.
    """
    options = parse_options(values)
    from l4q.distributed import is_main, leave
    from l4q.train import train

    result = train(options)
    if is_main() and as_json:
        print_json(result)
    elif is_main():
        click.echo(format_result(result))
    leave()


def parse_options(values: dict[str, Any]) -> TrainOptions:
    """The command line's values as `TrainOptions`.

    Raises:
        UsageError: A value is out of range, or two contradict each other.
    """
    rest = dict(values)
    take = rest.pop
    return TrainOptions(
        quant=QuantConfig(
            bits=int(take("bits")),
            group_size=take("group_size"),
            zero_point=take("zero_point"),
            scale_grid=take("scale_grid"),
        ),
        lora=LoraConfig(
            rank=take("rank"),
            alpha=take("alpha"),
            dropout=take("dropout"),
            target_modules=tuple(take("target_modules")),
        ),
        optim=OptimOptions(
            lr=take("lr"),
            scale_lr=take("scale_lr"),
            offset_lr=take("offset_lr"),
            weight_decay=take("weight_decay"),
            warmup_ratio=take("warmup_ratio"),
            max_grad_norm=take("max_grad_norm"),
            state=take("optim_state"),
        ),
        learning=GridLearning(
            train_scales=take("train_scales"),
            train_offsets=take("train_offsets"),
            move_base=take("move_base"),
            gradient_scale=take("gradient_scale"),
        ),
        overrides=tuple(map(Override.parse, take("overrides"))),
        skip=tuple(take("skip")),
        evaluation=EvalOptions(
            text=take("eval_text"), window=take("eval_window"), windows=take("eval_windows"), every=take("eval_every")
        ),
        report_to=tuple(name for name in take("report_to") if name != "none"),
        **rest,
    )


def format_result(result: dict[str, Any]) -> str:
    """The result as a few lines for people."""
    rows = [(label, result[key]) for key, label in RESULT_LINES.items()]
    rows += [(f"perplexity, {stage}", value) for stage, value in result["perplexity"].items()]
    return "\n".join(f"{label:22} {f'{v:.4f}' if isinstance(v, float) else v}" for label, v in rows)


def main() -> None:
    """Entry point of the `l4q-train` script."""
    run(command)


if __name__ == "__main__":
    main()

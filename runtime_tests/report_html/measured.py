"""How every number of the report was measured: key in report.json -> (name, one or two sentences)."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """A figure's name and where it comes from."""

    label: str
    how: str


MEASURES: dict[str, Measure] = {
    "perplexity": Measure(
        "Perplexity",
        "exp of the mean negative log-probability that the runtime gives the text's own next token. "
        "Every window is read "
        "on its own; its first token is context only.",
    ),
    "oracle_perplexity": Measure(
        "Oracle perplexity",
        "The same token ids through torch in float32, with the checkpoint's integers dequantized.",
    ),
    "delta_percent": Measure("Δ to oracle", "(perplexity / oracle perplexity − 1) · 100 %."),
    "perplexity_band": Measure(
        "Allowed band",
        "Oracle perplexity times 1 ± the bound on Δ of this format and runtime; the bounds give reasons.",
    ),
    "kl": Measure(
        "KL divergence",
        "Mean over all positions of KL(oracle ‖ runtime) between the two next-token distributions, over the whole "
        "vocabulary, in nats, summed in float64.",
    ),
    "top1": Measure("Top-1 agreement", "Share of positions where oracle and runtime put the same token first."),
    "mean_abs_dlogprob": Measure(
        "Mean |Δ log p|", "Mean distance between the two log-probabilities of the text's own tokens, in nats."
    ),
    "max_abs_dlogprob": Measure("Largest |Δ log p|", "The largest such distance; one token decides it."),
    "tokens_per_s": Measure(
        "Speed",
        "Greedy decoding after a short prompt, batch 1: new tokens − 1 by seconds. One run on this "
        "machine, with whatever "
        "else ran on it: no benchmark.",
    ),
    "greedy_match": Measure(
        "Greedy match",
        "Leading tokens of a greedy continuation that equal the oracle's. A near-tie may flip one, "
        "after which the texts "
        "part; nothing is judged by it.",
    ),
    "bit_exact": Measure(
        "Bit-exact tensors",
        "Quantized tensors that another project's decoder (compressed_tensors, gguf, onnx.reference) reads from the "
        "export as exactly the checkpoint's float32 weights, every bit equal.",
    ),
    "bytes": Measure("File size", "Bytes of the folder's weight files: .safetensors, .gguf, .onnx and .data."),
    "bits_per_weight": Measure(
        "Bits per weight", "Stored bits of the quantized tensors, with scales and zero-points, by quantized weight."
    ),
    "bytes_16bit": Measure("16-bit size", "Two bytes for every weight of the checkpoint, quantized or not."),
    "weight_error": Measure(
        "Weight error",
        "‖W_q − W_0‖ / ‖W_0‖ per layer (Frobenius): the trained and quantized weight against the 16-bit weight that "
        "training started from. It holds what was learned as well as what was rounded, so it is not an error alone.",
    ),
}

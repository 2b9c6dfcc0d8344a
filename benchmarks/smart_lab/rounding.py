"""Effects of rounding on a GGUF file's logits: ours, with and without activations in 8 bits, and
llama.cpp's.

    python -m smart_lab rounding FILE [--llama-cpp build/bin] [--text FILE]

The reference computes in float32 with the file's weights as they are. Texts are read in windows of
512 tokens; the second half of each counts, as in `llama-perplexity`. llama.cpp is compared by
`llama-perplexity --kl-divergence` with the same file in float32, on the same text.

Needed by docs/rounding.md.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from tqdm import tqdm

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Rows, RowsBuilder
from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_decoding.kernels.weights import Matrix, QuantizedTensor
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.families.decoder import Decoder, RoundingDecoder
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_lab.gguf.server import call, require
from smart_lab.provenance import check_outputs, provenance

QUANTIZE, PERPLEXITY = "llama-quantize", "llama-perplexity"
WINDOW = 512
ROOT = Path(__file__).resolve().parents[2]
DOCS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
_PATTERNS = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([0-9.]+)",
    "reference": r"Mean PPL\(base\)\s*:\s*([0-9.]+)",
    "kl": r"Mean\s+KLD:\s*([0-9.]+)",
    "same": r"Same top p:\s*([0-9.]+)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, the text, and llama.cpp's programs."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a GGUF file")
    add("--text", type=Path, help="what is read (this project's documentation)")
    add("--windows", type=int, default=20, help=f"of {WINDOW} tokens, at most (20)")
    add("--llama-cpp", type=Path, metavar="DIR", help="of llama-perplexity and llama-quantize")
    add("--json", type=Path, metavar="FILE", help="write the figures there")


@dataclass(slots=True)
class Difference:
    """Sums over positions: of -log p of the text, KL(reference, this) in nats, and positions whose
    likeliest token is the reference's."""

    count: int = 0
    loss: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, reference: torch.Tensor, found: torch.Tensor, text: torch.Tensor) -> None:
        """Add logits [rows, vocabulary], the reference's and these; text: next tokens [rows]."""
        exact = reference.double().log_softmax(-1)
        ours = found.double().log_softmax(-1)
        self.count += len(text)
        self.loss -= float(ours.gather(-1, text[:, None]).sum())
        self.kl += float((exact.exp() * (exact - ours)).sum())
        self.same += int((exact.argmax(-1) == ours.argmax(-1)).sum())

    @property
    def figures(self) -> dict[str, float]:
        """Perplexity, mean KL, and the share of likeliest tokens that are the same, in per cent."""
        perplexity = float(np.exp(self.loss / self.count))
        return {
            "perplexity": perplexity,
            "kl": self.kl / self.count,
            "same": 100 * self.same / self.count,
        }


class InFloats(Mapping[str, torch.Tensor]):
    """A checkpoint's weights in float32, quants not rounded to bf16."""

    def __init__(self, weights: Mapping[str, Matrix]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        if isinstance(weight, QuantizedTensor):
            return torch.from_numpy(dequantize(weight.rows, GGMLQuantizationType[weight.format]))
        return weight.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def main(args: argparse.Namespace) -> int:
    """Print a table. Raises ConfigError for what is missing before a model is loaded."""
    check_outputs((args.json,))
    if args.llama_cpp is not None:
        require(args.llama_cpp, (QUANTIZE, PERPLEXITY))
    text = read_text(args.text)
    figures = ours(args.file, text, args.windows)
    if args.llama_cpp is not None:
        figures["llama.cpp"] = theirs(args.file, text, args.windows, args.llama_cpp)
    print(f"| {args.file.name} | perplexity | KL | same first token |\n|---|---:|---:|---:|")
    for name, found in figures.items():
        print(f"| {name} | {found['perplexity']:.3f} | {found['kl']:.5f} | {found['same']:.2f} % |")
    if args.json is not None:
        write_json(args.json, {**provenance_of(args), "figures": figures})
    return 0


def provenance_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured, and where."""
    weights = load_checkpoint(args.file, quantization=None).provenance
    command = f"python -m smart_lab rounding {args.file.name} --windows {args.windows}"
    return provenance(command, 0, weights, None)


def read_text(path: Path | None) -> str:
    """Return a file's, or the project's documentation."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    files = [file for pattern in DOCS for file in sorted(ROOT.glob(pattern))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def ours(file: Path, text: str, most: int) -> dict[str, dict[str, float]]:
    """Return figures of the reference, of exact activations and of activations in 8 bits."""
    checkpoint = load_checkpoint(file, quantization=None)
    tokens = Tokenizer.load(checkpoint.tokenizer_source).encode(text, add_special_tokens=False)
    cut = [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW + 1, WINDOW)][:most]
    if not cut:
        raise ConfigError(f"the text has {len(tokens)} tokens: {WINDOW} are needed")
    config, cpu, pages = checkpoint.config, torch.device("cpu"), WINDOW // PAGE
    shape = (cpu, pages, WINDOW)
    floats = InFloats(checkpoint.weights)
    reference = Decoder(config, floats, torch.float32, *shape, native=False)
    decoders = {
        "float32": reference,
        "exact": Decoder(config, checkpoint.weights, torch.bfloat16, *shape),
        "int8": RoundingDecoder(config, checkpoint.weights, torch.bfloat16, *shape),
    }
    found = {name: Difference() for name in decoders}
    half = WINDOW // 2
    for window in tqdm(cut, "windows"):
        rows, following = rows_of(window), torch.tensor(window[half:])
        expected = None
        for name, decoder in decoders.items():
            logits = decoder.forward(rows).logits[half - 1 : -1].clone()
            expected = logits if expected is None else expected
            found[name].add(expected, logits, following)
    return {name: difference.figures for name, difference in found.items()}


def rows_of(tokens: list[int]) -> Rows:
    """Return the rows of a window, its keys in the first pages."""
    builder = RowsBuilder()
    builder.begin(np.arange(WINDOW // PAGE, dtype=np.int32))
    builder.add_committed(tokens, range(len(tokens)), range(len(tokens)))
    return builder.build()


def theirs(file: Path, text: str, most: int, programs: Path) -> dict[str, float]:
    """Return llama.cpp's figures, by its own program. Raises ModelError if it fails, and
    ConfigError for missing figures."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        floats, base = Path(scratch) / "floats.gguf", Path(scratch) / "base"
        (Path(scratch) / "text").write_text(text, encoding="utf-8")
        call([str(programs / QUANTIZE), "--allow-requantize", str(file), str(floats), "F32"])
        options = ["-c", str(WINDOW), "--chunks", str(most), "--kl-divergence-base", str(base)]
        perplexity = str(programs / PERPLEXITY)
        call([perplexity, "-m", str(floats), "-f", str(Path(scratch) / "text"), *options])
        said = call([perplexity, "-m", str(file), "--kl-divergence", *options])
    found = {}
    for name, pattern in _PATTERNS.items():
        match = re.search(pattern, said)
        if match is None:
            raise ConfigError(f"llama-perplexity does not say {name}: {said[-2000:]}")
        found[name] = float(match[1])
    return found

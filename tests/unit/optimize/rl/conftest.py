"""A tiny random model and a byte-level tokenizer, made here: nothing is downloaded."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Waiting threads sleep, as in the engine: tests share their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
pytest.importorskip("torch", reason="the engine needs the extra `engine`")

import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimize.rl.engine import Engine
from optimize.rl.model import LanguageModel

VOCABULARY = 258
torch.set_num_threads(1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<bos>": 1, **{letter: index + 2 for index, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


def tiny_gemma() -> Any:
    """Two layers, one with a sliding window of 8, so that short tests cross its edge."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=1,
        pad_token_id=0,
    )
    return _spread(Gemma3ForCausalLM(config))


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=1,
    )
    return _spread(LlamaForCausalLM(config))


def _spread(model: Any) -> Any:
    """Larger weights than the usual start, so that logits differ and answers vary. No id ends an answer."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.4 if "embed" in name else 0.25)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gemma().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> LanguageModel:
    return LanguageModel.load(tiny_directory)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The application on a real port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def engine(tiny: LanguageModel) -> Engine:
    return Engine(tiny, "tiny", max_batch=4)


@pytest.fixture(scope="session")
def url(engine: Engine) -> Iterator[str]:
    with served(engine.app()) as url:
        yield url

"""What the tests share: tiny models, a tiny trained checkpoint, a tiny lexicon. All on the CPU, in float32, on one thread."""

import contextlib
import http.server
import threading
from pathlib import Path

import pytest
import torch

import sft
from data import tokenizer
from model import ModelConfig, build_model

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)        # tiny tensors: a second thread costs more than it brings, and one is deterministic

PAD, END = 12, 11               # of toy(): 12 tokens, 0 .. 11, the last one is the end token
CPU = dict(device="cpu", dtype="float32")
TINY_SFT = dict(corpus_size=600, batch_size=16, grad_accum=1, max_steps=60, eval_interval=60, log_interval=20, n_layer=1, n_inner=0, n_head=2, n_embd=32,
                lr=1e-2, warmup_steps=5, **CPU)


def ids(*rows):
    return torch.tensor(rows)


def toy(seed=0, **sizes):
    """A model of 12 tokens: what an algorithm does with it is seen in milliseconds."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=PAD, end_id=END, start_id=END, block_size=24, n_layer=1, n_head=2, n_embd=32) | sizes
    return build_model(ModelConfig(**sizes)).eval()


def awake(model):
    """The model with weights large enough that all it does can be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def off():
    """What stages take for `autocast`: here it does nothing."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def serving(handler, **attributes):
    """A real server on loopback, on a port that the system chose, for as long as the block lasts; handlers find the attributes at self.server."""
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(attributes, url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def tok():
    return tokenizer("puns")


@pytest.fixture
def tiny(tok):
    """A GPT of one layer on the puns tokenizer, untrained."""
    return toy(vocab_size=tok.vocab_size, end_id=tok.end_id, start_id=tok.end_id, block_size=48)


@pytest.fixture(scope="session")
def sft_ckpt(tmp_path_factory):
    """The checkpoint of a tiny SFT run: knows a little of what a sentence is."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    sft.train(sft.Config(out_dir=str(folder), **TINY_SFT))
    return str(folder / "ckpt.pt")

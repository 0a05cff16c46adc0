"""Parity with transformers, both ways; the download, from a server of our own that looks like the hub."""

import http.server
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import serving
from test_model import close, make

from common import InputError
from data import Tokenizer, encode_records, tokenizer
from dpo import sum_logprobs
from model import Scorer, load_model, logprobs, save_model
from pretrained import HUB, export, is_transposed, load_pretrained, their_name

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).parent.parent
V, START, END = 60, 0, 1


def theirs(name):
    """A small model of transformers, with random weights."""
    torch.manual_seed(0)
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=V, n_positions=48, n_embd=32, n_layer=2, n_head=4, eos_token_id=END, bos_token_id=END))
    else:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=V, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=3, decoder_start_token_id=START, pad_token_id=START,
            feed_forward_proj="relu" if name == "t5-v1.0" else "gated-gelu", tie_word_embeddings=name == "t5-v1.0"))
        if name == "t5-v1.1":
            model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def their_logits(model, prompt, response, pad_id):
    """Logits of each response token."""
    mask = prompt != pad_id
    prompt, response = (tokens.masked_fill(tokens == pad_id, 0) for tokens in (prompt, response))
    if model.config.is_encoder_decoder:
        start = torch.full((len(prompt), 1), model.config.decoder_start_token_id)
        return model(input_ids=prompt, attention_mask=mask, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)).logits
    mask = F.pad(mask, (0, response.size(1)), value=True).long()
    out = model(input_ids=torch.cat([prompt, response], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    return out.logits[:, prompt.size(1) - 1:-1]


def their_greedy(model, prompt, pad_id, n):
    mask, prompt = (prompt != pad_id).long(), prompt.masked_fill(prompt == pad_id, 0)
    return model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0,
                          eos_token_id=V + 9)[:, -n:]


def small_tokenizer(folder, vocab_size):
    """A T5-like tokenizer.json: SentencePiece's unigrams, <pad> 0, </s> 1."""
    tok = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tok.decoder = tokenizers.decoders.Metaspace()
    tok.train_from_iterator(["I used to be a banker, but I lost interest."] * 9, tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    tok.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tok.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=["gpt2", "t5-v1.0", "t5-v1.1"])
def pair(request, tmp_path):
    """(ours, theirs): the same weights, through a folder."""
    model = theirs(request.param)
    model.save_pretrained(tmp_path)
    return load_model(tmp_path), model


@pytest.mark.parametrize("padded", [False, True])
def test_logits_tokens_and_gradients_are_theirs(pair, padded):
    ours, model = pair
    torch.manual_seed(1)
    prompt, response = torch.randint(2, V, (3, 8)), torch.randint(2, V, (3, 6))
    if padded:
        prompt[0, :3] = prompt[2, :7] = response[1, 3:] = ours.pad_id
    real = response != ours.pad_id
    logits = their_logits(model, prompt, response, ours.pad_id)
    close(ours.logits(prompt, response)[real], logits[real], atol=1e-4)

    (-logprobs(ours, prompt, response).sum() / real.sum()).backward()
    F.cross_entropy(logits[real], response[real]).backward()
    named = dict(model.named_parameters())
    for name, p in ours.named_parameters():
        grad = p.grad.T if is_transposed(ours.config.arch, name) else p.grad
        close(grad, named[their_name(ours.config.arch, name)].grad, atol=1e-4)

    ours.config.end_id = -1             # let it run on
    assert torch.equal(ours.generate(prompt, 20, temperature=0)[0], their_greedy(model, prompt, ours.pad_id, 20))


@pytest.mark.parametrize("name", ["gpt", "t5-v1.0", "t5-v1.1"])
def test_what_we_export_they_load(name, tmp_path):
    tok = tokenizer("puns")
    model = make(name, vocab_size=tok.vocab_size, end_id=tok.end_id, start_id=tok.end_id, block_size=48)
    save_model(tmp_path / "ckpt.pt", model, tokenizer="puns")
    subprocess.run([sys.executable, "model.py", "export", tmp_path / "ckpt.pt", tmp_path / "out"], cwd=ROOT, check=True)
    auto = transformers.AutoModelForCausalLM if name == "gpt" else transformers.AutoModelForSeq2SeqLM
    exported, their_tok = auto.from_pretrained(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["About a banker:", " I used to be a banker, but I lost interest.\n\n  \tIt's 1234 naïve 🙂 ½'s", "", "  x  "]
    for text in texts:
        assert their_tok(text, add_special_tokens=False).input_ids == tok.encode(text)
        assert their_tok.decode(tok.encode(text)) == text
    assert their_tok.eos_token_id == tok.end_id and their_tok.pad_token_id == model.pad_id == tok.vocab_size

    prompt, response = torch.tensor([[tok.pad_id, *tok.encode("About a banker:")]]), torch.tensor([tok.encode(" I lost it.")])
    logits = their_logits(exported, prompt, response, model.pad_id)
    close(logits[..., :-1], model.logits(prompt, response), atol=1e-4)
    close(logits[..., -1], logits[..., :-1].mean(-1), atol=1e-4)         # the pad, which they must have: never likely
    assert exported.generation_config.suppress_tokens == [model.pad_id]
    again = load_model(tmp_path / "out")                                 # and back again
    assert torch.equal(again.logits(prompt, response), model.logits(prompt, response)) and again.config == model.config
    assert [Tokenizer(again.tokenizer).encode(text) for text in texts] == [tok.encode(text) for text in texts]


def test_t5_with_its_own_tokenizer_goes_out_as_it_came(tmp_path):
    theirs("t5-v1.1").save_pretrained(tmp_path)
    small_tokenizer(tmp_path, 40)                                        # fewer tokens than rows, as T5 has
    model, tok = load_model(tmp_path), tokenizer(str(tmp_path))
    text = " I used to be a banker"
    assert (tok.pad_id, tok.end_id) == (model.pad_id, model.config.end_id) == (V, END)
    assert tok.decode([*tok.encode(text), tok.end_id, tok.pad_id]) == text and END not in tok.encode("a </s> b")
    save_model(tmp_path / "ckpt.pt", model, tokenizer=model.tokenizer)
    export(str(tmp_path / "ckpt.pt"), str(tmp_path / "out"))
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tok(text).input_ids == [*tok.encode(text), END] and their_tok.pad_token_id == 0
    weights = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in theirs("t5-v1.1").state_dict().items())


def test_what_cannot_go_in_or_out_is_said(tmp_path):
    for arch in ("palm", "gpt"):
        model = make(arch)
        save_model(tmp_path / f"{arch}.pt", model if arch == "palm" else Scorer(model), tokenizer="puns")
        with pytest.raises(InputError, match="transformers"):
            export(str(tmp_path / f"{arch}.pt"), str(tmp_path / "out"))
    for change, message in [({"model_type": "llama"}, "llama"), ({"activation_function": "relu"}, "gelu_new"),
                            ({"n_embd": 64}, r"transformer.wte.weight is of shape \(60, 32\).*\(60, 64\)")]:
        theirs("gpt2").save_pretrained(tmp_path / "in")
        path = tmp_path / "in" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=message):
            load_pretrained(str(tmp_path / "in"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd": 32}))
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "pytorch_model.bin")        # a pickle is not looked at
    with pytest.raises(InputError, match="model.safetensors is not there"):
        load_pretrained(str(tmp_path / "in"))
    with pytest.raises(InputError, match="neither a folder"):
        Tokenizer("gtp2")


def test_download_cache_and_no_network(tmp_path):
    repo, revision = HUB["t5-small"].split("@")
    folder, asked = tmp_path / "served", []
    theirs("t5-v1.0").save_pretrained(folder)
    small_tokenizer(folder, 40)

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = folder / Path(self.path).name
            found = self.path.startswith(f"/{repo}/resolve/{revision}/") and path.exists()
            body = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            for name, value in {"ETag": f'"{path.name}"', "X-Repo-Commit": revision, "Content-Length": len(body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
        do_HEAD = do_GET

    def load(name, url="http://127.0.0.1:1", **settings):
        code = f"from model import *\nfrom data import tokenizer\nm = load_model('{name}')\n" \
               "print(m.logits(torch.tensor([[5, 6]]), torch.tensor([[7, 8]])).tolist(), tokenizer(m.tokenizer).encode('used'))"
        environ = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"),
                                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "TQDM_POSITION": "-1"} | settings
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    with serving(Hub) as server:
        first = load("t5-small", server.url)
        assert first.returncode == 0, first.stderr
        assert "100%" in first.stderr                                              # the progress bar
        assert {path for path in asked if "/resolve/" in path} == {                # the pinned one, no pickle
            f"/{repo}/resolve/{revision}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")}
        logits = load_model(folder).logits(torch.tensor([[5, 6]]), torch.tensor([[7, 8]])).tolist()
        assert first.stdout == f"{logits} {tokenizer(str(folder)).encode('used')}\n"
    assert load("t5-small", HF_HUB_OFFLINE="1").stdout == first.stdout             # from the cache
    missing = load("gpt2", HF_HUB_OFFLINE="1").stderr
    assert "config.json of openai-community/gpt2 is not in the cache" in missing and "hf download" in missing


def test_trl_takes_it_from_there(tmp_path):
    """One DPO step of TRL on an exported model, from checkpoint to trainer with nothing between: its loss is ln 2, the log-probs that it sums are
    those of dpo.py, end token included, and the weights move."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tok = tokenizer("puns")
    model = make("gpt", vocab_size=tok.vocab_size, end_id=tok.end_id, start_id=tok.end_id, block_size=48)
    save_model(tmp_path / "ckpt.pt", model, tokenizer="puns")
    export(str(tmp_path / "ckpt.pt"), str(tmp_path / "out"))
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    pairs = [{"prompt": f"About a {thing}:", "chosen": " I lost interest.", "rejected": " I went home early."} for thing in ("banker", "nurse", "baker", "pilot")]
    args = trl.DPOConfig(output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
                         logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = trl.DPOTrainer(policy, args=args, train_dataset=datasets.Dataset.from_list(pairs), processing_class=their_tok)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-4)
    encoded = encode_records(pairs, "puns", ["prompt", "chosen", "rejected"], 48)
    chosen, rejected = sum_logprobs(model, encoded["prompt"].long(), [encoded["chosen"].long(), encoded["rejected"].long()])
    assert log["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-2) and log["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-2)
    assert all(not torch.equal(weight, before[name]) for name, weight in policy.state_dict().items() if name.endswith("weight"))

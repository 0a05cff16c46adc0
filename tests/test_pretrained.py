"""Pretrained weights: parity with transformers both ways, and downloads from a hub of our own."""

import http.server
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import VARIANTS, awake, close, program, refuses, serving, toy

from data import encode_records, tokenizer, tokenizer_of
from model import RewardModel, load_model, logprobs, save_model
from real import pretrained
from real.pretrained import HUB, convert, export, load_pretrained

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
V, START, END = 60, 0, 1
CLASSES = {family.model_type: family.class_name for family in pretrained.FAMILIES.values()}


# layers, heads, key heads, head size, buckets of distance, and the longest of these; for each seed
SHAPES = [(2, 4, 2, 8, 32, 128), (1, 2, 2, 6, 8, 16), (3, 4, 1, 4, 16, 30)]


def published(name, seed=0):
    """A small model of transformers with random weights."""
    torch.manual_seed(seed)
    n_layer, n_head, n_kv_head, head_size, n_buckets, longest = SHAPES[seed]
    if name == "gpt2":
        model_type, sizes = name, dict(n_positions=48, n_embd=32, n_layer=n_layer, n_head=n_head)
    elif name in ("llama", "qwen2"):
        model_type = name
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=n_layer,
                     num_attention_heads=n_head, num_key_value_heads=n_kv_head, head_dim=head_size,
                     max_position_embeddings=48, rms_norm_eps=1e-2,
                     rope_parameters={"rope_theta": 50.0, "rope_type": "default"},
                     tie_word_embeddings=(name == "llama") == (seed > 0))
    else:
        is_old = name == "t5-v1.0"      # the head is tied
        model_type, sizes = "t5", dict(
            d_model=32, d_kv=head_size, d_ff=48, num_layers=n_layer, num_heads=n_head,
            decoder_start_token_id=START, pad_token_id=START,
            relative_attention_num_buckets=n_buckets, relative_attention_max_distance=longest,
            feed_forward_proj="relu" if is_old else "gated-gelu", tie_word_embeddings=is_old)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=V, eos_token_id=END, bos_token_id=END, **sizes)
    model = getattr(transformers, CLASSES[model_type])(config)
    if name == "t5-v1.1":               # else its file has no head
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 32))
    return awake(model).eval()


def small_tokenizer(folder, vocab_size=40):
    """A tokenizer.json like T5's: SentencePiece's unigrams, <pad> is 0, </s> is 1."""
    tok = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tok.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False)
    tok.train_from_iterator(["I used to be a sailor, but I sold the boat."] * 9, trainer)
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", END)])
    tok.save(str(folder / "tokenizer.json"))


def folder_of(path, model):
    """A published model, or that of a name, and a tokenizer as a folder in the hub's layout."""
    model = published(model) if isinstance(model, str) else model
    model.save_pretrained(path)
    small_tokenizer(path)
    return str(path)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def puns_checkpoint(path, variant, tok):
    model = awake(toy(vocab_size=tok.vocab_size, eos_token_id=tok.eos_token_id,
                      decoder_start_token_id=tok.eos_token_id, block_size=48, n_layer=2,
                      **VARIANTS[variant]))
    save_model(path, model, tok)
    return model


def their_logits(model, prompt, response, pad):
    """Logits of each response token, by transformers."""
    mask = prompt != pad
    prompt = prompt.masked_fill(~mask, 0)
    response = response.masked_fill(response == pad, 0)
    if model.config.is_encoder_decoder:
        start = torch.full((len(prompt), 1), model.config.decoder_start_token_id)
        inputs = torch.cat([start, response[:, :-1]], dim=1)
        return model(input_ids=prompt, attention_mask=mask, decoder_input_ids=inputs).logits
    mask = F.pad(mask, (0, response.size(1)), value=True).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=torch.cat([prompt, response], dim=1), attention_mask=mask,
                position_ids=positions)
    return out.logits[:, prompt.size(1) - 1:-1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "t5-v1.0", "t5-v1.1", "t5-v1.1, tied"])
def test_logits_gradients_and_greedy_tokens_are_theirs(tmp_path, name, seed):
    """Through a folder and the checkpoint made of it."""
    theirs = published(name, seed)
    folder_of(tmp_path, theirs)
    if name == "llama" and seed == 1:       # as transformers 4 writes it
        change_json(tmp_path / "config.json", rope_parameters=None, rope_theta=50.0)
    convert(str(tmp_path), str(tmp_path / "out"))
    ours = load_model(tmp_path / "out" / "ckpt.pt")
    family, pad = pretrained.family_of(ours.config), ours.pad_token_id
    prompt, response = torch.randint(2, V, (3, 18)), torch.randint(2, V, (3, 20))
    prompt[0, :3] = prompt[2, :17] = response[1, 3:] = pad
    mask = response != pad
    logits = their_logits(theirs, prompt, response, pad)
    close(ours(prompt, response)[mask], logits[mask], atol=1e-4)

    (-logprobs(ours, prompt, response).sum() / mask.sum()).backward()
    F.cross_entropy(logits[mask], response[mask]).backward()
    named = dict(theirs.named_parameters())
    if name != "t5-v1.1, tied":         # there our head has a gradient of its own
        for key, p in ours.named_parameters():
            expected = named[pretrained.their_name(family, key)].grad
            close(pretrained.change_layout(family, key, p.grad), expected, atol=1e-4)

    ours.config.eos_token_id = -1               # let it run on
    greedy = theirs.generate(
        input_ids=prompt.masked_fill(prompt == pad, 0), attention_mask=(prompt != pad).long(),
        max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=V + 9)
    assert torch.equal(ours.generate(prompt, 20, temperature=0)[0], greedy[:, -20:])


@pytest.mark.parametrize("variant", ["gpt", "llama", "t5-v1.0", "t5-v1.1"])
def test_transformers_loads_an_export_and_so_do_we(variant, tmp_path, tok):
    model = puns_checkpoint(tmp_path / "ckpt.pt", variant, tok)
    assert program("real.pretrained", "export", tmp_path / "ckpt.pt",
                   tmp_path / "out").returncode == 0
    auto = transformers.AutoModelForCausalLM
    if variant.startswith("t5"):
        auto = transformers.AutoModelForSeq2SeqLM
    exported = auto.from_pretrained(tmp_path / "out")
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["About a banker:", "", "  x  ", " a <|pad|> b",
             " I used to be a sailor, but I sold the boat.\n\n  \tIt's 1234 naïve 🙂 ½'s"]
    for text in texts:
        if "pad" not in text:       # a special token of theirs
            assert their_tok(text, add_special_tokens=False).input_ids == tok.encode(text)
        assert their_tok.decode(tok.encode(text)) == text
    assert their_tok.eos_token_id == tok.eos_token_id and their_tok.padding_side == "left"
    assert their_tok.pad_token_id == model.pad_token_id == tok.vocab_size

    prompt = torch.tensor([[model.pad_token_id, *tok.encode("About a banker:")]])
    response = torch.tensor([tok.encode(" I lost it.")])
    logits = their_logits(exported, prompt, response, model.pad_token_id)
    close(logits[..., :-1], model(prompt, response), atol=1e-4)
    close(logits[..., -1], logits[..., :-1].mean(-1), atol=1e-4)    # of the pad: never likely
    how = exported.generation_config
    assert how.suppress_tokens == [how.pad_token_id] == [tok.vocab_size]
    assert how.eos_token_id == tok.eos_token_id

    again, again_tok = load_pretrained(str(tmp_path / "out"))       # and back again
    assert again.config == model.config
    assert torch.equal(again(prompt, response), model(prompt, response))
    assert [again_tok.encode(text) for text in texts] == [tok.encode(text) for text in texts]


def test_the_file_of_gpt2_itself_has_no_prefix(tmp_path):
    safetensors, theirs = pytest.importorskip("safetensors.torch"), published("gpt2")
    folder = folder_of(tmp_path, theirs)
    weights = {key.removeprefix("transformer."): weight.contiguous()
               for key, weight in theirs.state_dict().items() if key != "lm_head.weight"}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    ours, _ = load_pretrained(folder)
    close(ours.wte.weight, theirs.transformer.wte.weight)


@pytest.mark.parametrize("name", ["llama", "qwen2", "t5-v1.1"])
def test_it_goes_out_as_it_came_in(tmp_path, name):
    """The tokenizer has fewer tokens than the model has rows, as T5's has."""
    convert(folder_of(tmp_path / "in", name), str(tmp_path / "run"))
    (tmp_path / "in" / "tokenizer.json").unlink()       # the checkpoint has its own copy
    model = load_model(tmp_path / "run" / "ckpt.pt")
    tok = tokenizer_of(model)
    text = " I used to be a sailor"
    assert (tok.pad_token_id, tok.eos_token_id) == (model.pad_token_id, END) == (V, END)
    assert tok.decode([*tok.encode(text), tok.eos_token_id, tok.pad_token_id]) == text
    assert END not in tok.encode("a </s> b")
    export(str(tmp_path / "run" / "ckpt.pt"), str(tmp_path / "out"))
    if name != "qwen2":         # transformers has its own tokenizer for these, whatever we write
        their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert their_tok(text).input_ids == [*tok.encode(text), END] and their_tok.pad_token_id == 0
    again = type(published(name)).from_pretrained(tmp_path / "out")
    assert again.config.get_text_config().to_dict().get("rope_parameters") == (
        published(name).config.to_dict().get("rope_parameters"))
    for key, weight in published(name).state_dict().items():
        assert torch.equal(weight, again.state_dict()[key])


def test_shards_half_precision_and_a_pad_that_is_the_end_token(tmp_path):
    folder = tmp_path / "in"
    published("gpt2").half().save_pretrained(folder, max_shard_size="20KB")
    small_tokenizer(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    # Both are the last row. It must stay: it is not a pad that export() has added.
    change_json(folder / "config.json", eos_token_id=V - 1, pad_token_id=V - 1)
    model, _ = load_pretrained(str(folder))
    assert model.config.vocab_size == V and model.wte.weight.dtype == torch.float32
    close(model.wte.weight, published("gpt2").transformer.wte.weight, atol=1e-2)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:100])
    refuses(f"{shard.name}: this file is damaged", load_pretrained, str(folder))
    change_json(folder / pretrained.INDEX, weight_map=None)
    refuses("'weight_map' is missing", load_pretrained, str(folder))


def test_what_cannot_go_in_or_out_is_one_sentence(tmp_path, tok):
    gpt = puns_checkpoint(tmp_path / "gpt.pt", "gpt", tok)
    puns_checkpoint(tmp_path / "palm.pt", "palm", tok)
    save_model(tmp_path / "reward.pt", RewardModel(gpt), tok)
    for name, message in (("palm", "transformers has no class for this palm"),
                          ("reward", "a language model is needed")):
        refuses(message, export, str(tmp_path / f"{name}.pt"), str(tmp_path / "out"))
    for name, change, message in (
            ("gpt2", {"model_type": "bert"}, "'bert'; only gpt2, llama, t5, qwen2 can be loaded"),
            ("gpt2", {"activation_function": "relu"}, "only gelu_new is supported"),
            ("gpt2", {"eos_token_id": [1, 2]}, "one number"),
            ("gpt2", {"n_embd": 64}, r"wte.weight has the shape \(60, 32\).*\(60, 64\)"),
            ("gpt2", {"n_layer": 3}, "transformer.h.2.ln_1.weight is missing"),
            ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
             r"rope scaling \(linear\) is not supported"),
            ("llama", {"rope_parameters": {"rope_type": "llama3"}}, r"rope scaling \(llama3\)"),
            ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
            ("llama", {"attention_bias": True}, "attention_bias is True; only False"),
            ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "layer_idx is True; only False"),
            ("t5-v1.1", {"num_decoder_layers": 3}, "num_decoder_layers is 3; only 2"),
            ("llama", {"mlp_bias": True}, "mlp_bias is True; only False"),
            ("llama", {"rope_theta": "big", "rope_parameters": None}, "rope_theta is big"),
            ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
            ("qwen2", {"eos_token_id": None}, "eos_token_id is missing")):
        folder = folder_of(tmp_path / name, name)
        change_json(tmp_path / name / "config.json", **change)
        refuses(message, load_pretrained, folder)
    folder = folder_of(tmp_path / "in", "gpt2")
    # A pickle is not looked at.
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "pytorch_model.bin")
    refuses("model.safetensors does not exist", load_pretrained, folder)
    for broken, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "in" / "config.json").write_text(broken)
        refuses(message, load_pretrained, folder)
    result = program("real.pretrained", "gtp2", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "there is no model 'gtp2'" in result.stderr


def test_download_cache_and_no_network(tmp_path):
    repo, revision = HUB["t5-small"].split("@")
    asked = []
    folder_of(tmp_path / "served", "t5-v1.0")

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = tmp_path / "served" / Path(self.path).name
            found = self.path.startswith(f"/{repo}/resolve/{revision}/") and path.exists()
            body = path.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("X-Repo-Commit", revision)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
        do_HEAD = do_GET

    def load(name, out, url="http://127.0.0.1:1", **settings):
        return program("real.pretrained", name, tmp_path / out, HF_ENDPOINT=url, TQDM_POSITION="-1",
                       HF_HOME=str(tmp_path / "cache"), NO_PROXY="127.0.0.1",
                       HF_HUB_DISABLE_XET="1", **settings)

    with serving(Hub) as server:
        first = load("t5-small", "first", server.url)
    assert first.returncode == 0, first.stderr
    assert "100%" in first.stderr               # the progress bar
    files = ("config.json", "model.safetensors", "tokenizer.json")
    assert {path for path in asked if "/resolve/" in path} == {
        f"/{repo}/resolve/{revision}/{file}" for file in files}
    assert load("t5-small", "second", HF_HUB_OFFLINE="1").returncode == 0       # from the cache
    expected, _ = load_pretrained(str(tmp_path / "served"))
    for out in ("first", "second"):
        model = load_model(tmp_path / out / "ckpt.pt")
        assert tokenizer_of(model).encode("used")
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected.state_dict()[name])
    missing = load("gpt2", "third", HF_HUB_OFFLINE="1")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "config.json of openai-community/gpt2 is not in the cache" in missing.stderr
    assert "hf download" in missing.stderr and not (tmp_path / "third").exists()


def test_trl_trains_an_export(tmp_path):
    """One DPO step of TRL from our checkpoint: its loss is ln 2, its log-probs are ours, end token
    included, and the weights move."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tok = tokenizer("puns")
    model = puns_checkpoint(tmp_path / "ckpt.pt", "gpt", tok)
    export(str(tmp_path / "ckpt.pt"), str(tmp_path / "out"))
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    pairs = [{"prompt": f"About a {thing}:", "chosen": " I lost interest.",
              "rejected": " I went home early."} for thing in ("banker", "nurse", "baker", "pilot")]
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=4,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = trl.DPOTrainer(policy, args=args, train_dataset=datasets.Dataset.from_list(pairs),
                             processing_class=their_tok)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-4)
    encoded = encode_records(pairs, tok, ["prompt", "chosen", "rejected"], 48)
    for field in ("chosen", "rejected"):
        logp = logprobs(model, encoded["prompt"].long(), encoded[field].long()).sum(dim=1)
        assert log[f"logps/{field}"] == pytest.approx(logp.mean().item(), abs=1e-2)
    for name, weight in policy.state_dict().items():
        if name.endswith("weight"):
            assert not torch.equal(weight, before[name])

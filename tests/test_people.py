"""Real puns: the parts of the texts, the comparisons, the report by hand, and all of it on toys."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import CPU, close, make, off
from matplotlib.figure import Figure
from test_semeval import plain, pun, write_expun

from common import make_rng, read_jsonl, write_jsonl
from data import complete, tokenizer, tokenizer_of
from model import RewardModel, load_model, load_reward_model
from real import people, pretrained, story
from real.duplicates import group_records
from real.semeval import PROMPT
from reward_model import score_texts

RATERS = (0, 1, 3, 4, 10)


def toy_puns():
    """80 puns on knead (need) and 40 texts that are none; of both, every second one is rated.

    Texts 2 and 3 are one joke told twice, and 4 is offensive to two of five raters."""
    puns = []
    for i in range(120):
        if i < 80:
            text = pun(f"het_{i}", f"My cat number{i} thing{i} likes to knead dough{i}.")
        else:
            text = plain(f"het_{i}", f"My sentence{i} about thing{i} needs no word{i} today.")
        if i % 2 == 0:
            text = text._replace(part="full", raters=RATERS, n_offensive=2 if i == 4 else 1,
                                 ratings=(i % 5, (i + 2) % 5, 1, 0, i % 3))
        puns.append(text)
    puns[3] = puns[2]._replace(id="het_3", text=puns[2].text + " Again.", ratings=(), raters=())
    return puns


def test_every_text_is_there_with_its_ratings_if_it_has_any(tmp_path):
    semeval, expun = write_expun(tmp_path)
    semeval = Path(semeval).rename(tmp_path / "elsewhere")      # not where it is found unasked
    puns = people.load_puns(people.Config(semeval=str(semeval), expun=str(expun)))
    assert len(puns) == 65 and sum(pun.part == "full" for pun in puns) == 40


def test_no_near_duplicate_is_in_two_parts_and_only_judged_texts_are_gold():
    puns = toy_puns()
    parts = people.parts_of(puns, seed=1)
    part_of = {pun.id: part for part, texts in parts.items() for pun in texts}
    assert len(part_of) == sum(map(len, parts.values())) == 120     # each text once
    for rows in group_records(puns):
        assert len({part_of[puns[i].id] for i in rows}) == 1
    assert part_of["het_2"] == part_of["het_3"]
    assert len(parts["test"]) in (18, 19) and len(parts["val"]) in (5, 6)
    judged = {part: [pun for pun in texts if pun.ratings or not pun.is_pun]
              for part, texts in parts.items()}
    assert abs(len(judged["gold"]) - len(judged["train"])) <= 2     # a half each
    assert len(parts["gold"]) - len(judged["gold"]) <= 1            # the twin of a rated one
    assert people.parts_of(puns, seed=2) != parts


def test_policies_learn_inoffensive_puns_by_their_word():
    records = people.completions(toy_puns())
    assert len(records) == 79
    assert records[0] == {"prompt": 'A pun with the word "knead":',
                          "completion": " My cat number0 thing0 likes to knead dough0."}


def test_rl_does_not_ask_for_the_words_of_held_out_puns(tmp_path, monkeypatch):
    puns = [pun(f"p{i}", f"My own{i} joke{i} on word{i}.", word=f"word{i}") for i in range(40)]
    monkeypatch.setattr(people, "load_puns", lambda config: puns)
    people.write_data(people.Config(out_dir=str(tmp_path)))
    asked = {path.stem: {row["prompt"] for row in read_jsonl(path)}
             for path in (tmp_path / "data").iterdir()}
    assert asked["trained_prompts"] == asked["train"] and asked["val"] and asked["test"]
    assert not asked["rl_prompts"] & (asked["val"] | asked["test"])
    assert len(asked["rl_prompts"] - asked["train"]) > 100      # everyday words
    assert len(asked["unseen_prompts"]) == 200
    assert not asked["unseen_prompts"] & asked["rl_prompts"]


def test_everyday_words_are_in_no_pun():
    words = people.WORDS.read_text(encoding="utf-8").split()
    assert len(words) == len(set(words)) >= 300
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    angle = pun("a", "The Angle, of course.", word="Angle", alt="", lemma="")
    left = people.everyday_words([angle, plain("b", "An array.")])
    assert set(words) - set(left) == {"angle"}


def test_comparisons_by_hand():
    """Each source has one or two comparisons here."""
    full = dict(part="full", raters=(0, 1), n_offensive=0)
    puns = [pun("a", "Bakers knead dough.", ratings=(3, 4), **full),
            plain("b", "No pun today.", ratings=(1, 4), **full), plain("c", "Nor one here.")]
    prompt = 'A pun with the word "knead":'
    # The raters of this one agree that it is offensive: nobody learns from it.
    puns.append(puns[0]._replace(id="d", text="You knead it.", ratings=(5, 5), n_offensive=2))
    # Puns on other words. Each of the first two has the other as its partner; the last has none,
    # since nothing else ends with s.
    sole = "In the end you will find that a fish has an Ole."
    puns += [pun("e", sole, word="Ole", alt="", lemma="ole"),
             pun("f", "Nobody at his age reads maps anymore, I am afraid.", word="maps", alt="",
                 lemma="map")]
    # An empty text loses to nothing.
    samples = {prompt: (" I knead you. ", "She kneaded it."),
               people.word_prompt("ole"): ("", "Ole!")}
    records = people.comparisons(puns, samples, 1000, 0)
    found = {(r["source"], r["prompt"], r["chosen"], r["rejected"], r["margin"], r["share"])
             for r in records}
    chosen = " Bakers knead dough."
    assert found == {("rated", PROMPT, chosen, " No pun today.", 1.0, 0.75),
                     ("detected", PROMPT, chosen, " No pun today.", 1.0, 1.0),
                     ("detected", PROMPT, chosen, " Nor one here.", 1.0, 1.0),
                     ("minimal", prompt, chosen, " Bakers need dough.", 1.0, 1.0),
                     ("sampled", prompt, chosen, " I knead you.", 1.0, 1.0),
                     ("used", prompt, " I knead you.", " She kneaded it.", 1.0, 1.0),
                     ("other", prompt, chosen, f" {sole}", 1.0, 1.0),
                     ("other", people.word_prompt("ole"), f" {sole}", chosen, 1.0, 1.0),
                     ("swapped", prompt, chosen, f" {sole[:-7]}a Knead.", 1.0, 1.0),
                     ("swapped", people.word_prompt("ole"), f" {sole}", " Bakers ole dough.", 1.0,
                      1.0)}
    assert sum(people.SOURCES.values()) == pytest.approx(1)
    few = [record["source"] for record in people.comparisons(toy_puns(), {}, 50, 0)]
    assert [few.count(source) for source in ("rated", "detected", "minimal")] == [10, 11, 4]


def test_each_prompt_has_two_completions_of_its_own(tmp_path, sft_ckpt, monkeypatch):
    def write(model, tok, prompts, *rest, max_new_tokens):
        assert max_new_tokens == people.MAX_NEW_TOKENS
        return [f"{prompt} {i}" for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(people, "complete", write)
    known = {tmp_path / "sft" / "ckpt.pt": sft_ckpt}
    monkeypatch.setattr(people, "load_model", lambda path, device: load_model(known[path]))
    puns = [pun("a"), pun("b", "A fish has a sole.", word="sole")]
    knead, sole = people.word_prompt("knead"), people.word_prompt("sole")
    assert people.sample_sft(people.Config(out_dir=str(tmp_path), **CPU), puns, 0) == {
        knead: (f"{knead} 0", f"{knead} 2"), sole: (f"{sole} 1", f"{sole} 3")}


def test_each_part_is_compared_with_samples_to_its_own_words(tmp_path, monkeypatch):
    puns = [pun(f"p{i}", f"My own{i} joke{i} on word{i}.", word=f"word{i}", part="full",
                raters=(0, 1), ratings=(1, 2)) for i in range(40)]
    monkeypatch.setattr(people, "load_puns", lambda config: puns)
    monkeypatch.setattr(people, "sample_sft", lambda config, puns, seed: {
        row["prompt"]: (" A draw.", " Other.") for row in people.completions(puns)})
    people.write_pairs(people.Config(out_dir=str(tmp_path)))
    for part, texts in people.parts_of(puns, people.Config().split_seed).items():
        rows = read_jsonl(tmp_path / "data" / f"pairs_{part}.jsonl")
        assert texts and {row["prompt"] for row in rows if row["source"] == "sampled"} == {
            people.word_prompt(text.pun_word) for text in texts}


def test_a_partner_has_another_word():
    """Of puns on one word, and of those with the word in the text, none is a partner."""
    puns = [pun("a"), pun("b", "I knead you."), pun("c", "A Knead to iron.", word="iron")]
    puns += [pun("d", "A fish has a sole.", word="sole"), plain("e", "No pun.")]
    found = {(a.id, b.id) for seed in range(20) for a, b in people.partners(puns, seed)}
    assert found == {("a", "d"), ("b", "d"), ("c", "a"), ("c", "b"), ("c", "d"), ("d", "a"),
                     ("d", "b"), ("d", "c")}
    assert list(people.partners(puns, 3)) == list(people.partners(puns, 3))


def test_auc_by_hand():
    """Of six pairs, 3 beats both, 1 ties one and loses one, 0 loses both."""
    assert people.auc(torch.tensor([3.0, 1, 0]), torch.tensor([1.0, 2])) == pytest.approx(2.5 / 6)


def test_a_judge_is_measured_by_hand(monkeypatch):
    """A judge that likes long texts, unless it is asked for short ones: right on one of three pairs
    of ratings, wrong on a sample."""
    monkeypatch.setattr(people, "tokenizer_of", lambda model: None)
    monkeypatch.setattr(people, "score_texts", lambda judge, tok, prompts, texts, autocast:
                        torch.tensor([len(text) * (-1.0 if prompt == "short" else 1.0)
                                      for prompt, text in zip(prompts, texts, strict=True)]))
    full = dict(part="full", raters=(0, 1))
    puns = [pun("a", "Six or so.", word="Six", ratings=(4, 4), **full),
            pun("b", "Two.", word="Two", ratings=(4, 3), **full),
            plain("c", "No pun at all.", ratings=(0, 0), **full)]
    pairs = [{"source": "minimal", "prompt": "", "chosen": "longer", "rejected": "short"},
             {"source": "sampled", "prompt": "", "chosen": "short", "rejected": "longer"},
             {"source": "other", "prompt": "", "chosen": "longer", "rejected": "short"},
             {"source": "swapped", "prompt": "short", "chosen": "short", "rejected": "longer"}]
    row = people.measure_judge(SimpleNamespace(model=None), puns, pairs, off)
    assert row["pun or not, AUC"] == 0                              # c is the longest
    assert row["raters, margin 0.4"] == pytest.approx(1 / 3)        # a b, but not a c and b c
    assert row["raters, margin 1.0"] == 0                           # a and b are too close
    assert row["pun over minimal pair"] == 1 and row["pun over a sample"] == 0
    assert row["pun over another word's"] == 1 and row["pun over word put in"] == 1
    assert "word used over not" not in row                          # there is no such pair


def test_overlap_by_hand():
    """Weights: "the" is in both texts, log 3/2; "cat" and "dog" in one, log 3; "cow" counts as
    much as a word of one text."""
    overlap = people.overlap_with(["The cat.", "The dog."])
    common, rare = torch.tensor(1.5).log().item(), torch.tensor(3.0).log().item()
    assert overlap("the CAT") == pytest.approx(1)
    assert overlap("the cow") == pytest.approx(common / (common + 2 * rare))
    assert overlap("a cow") == 0
    assert overlap("the dog") == pytest.approx(1)


def test_a_row_of_the_table_by_hand():
    def row(word, text, gold):
        return {"prompt": people.word_prompt(word), "text": text, "gold": gold, "score": gold + 1,
                "kl": 2.0, "length": 3}

    rows = [row("sole", " One Sole.", 3.0), row("sole", " A fish.", 1.0),
            row("jam", " Jammed in.", 5.0), row("jam", " Jammed in.", 5.0)]
    baseline = [row("sole", "", 2.0), row("sole", "", 1.0), row("jam", "", 0.0),
                row("jam", "", 9.0)]
    result = people.describe_policy(rows, baseline, people.overlap_with(["A fish."]))
    # Each text beside both of its prompt: 1, 1; 0, .5; and for jam 1, 0 twice. By prompt: .625, .5.
    assert result["win rate"] == 0.5625 and result["win rate ±"] == pytest.approx(1.96 * 0.0625)
    assert result["gold ±"] == pytest.approx(1.96 * 1.5)                # by prompt: 2, 5
    assert result["gold"] == 3.5 and result["proxy"] == 4.5 and result["kl"] == 2
    assert result["uses the word"] == 0.25              # "Jammed" is not "jam"
    assert result["distinct"] == 0.75 and result["copied"] == 0.25 and result["words"] == 2
    assert people.table("x", {"sft": {"a": 1.0, "a ±": 0.5, "b": 2.0}}) == (
        "| x | a | b |\n| --- | --- | --- |\n| sft | 1.000 ± 0.500 | 2.000 |\n")


# One step of each stage is enough to see that they fit together.
TINY = {"sft.py": "--epochs 0.1",
        "reward_model.py": "--max_steps 1 --batch_size 4",
        "discriminator.py": "--max_steps 1 --batch_size 4",
        "dpo.py": "--max_steps 1 --batch_size 4",
        "ppo.py": "--max_steps 1 --batch_size 4 --minibatch_size 2 --max_new_tokens 6",
        "gan.py": "--max_steps 1 --batch_size 4 --minibatch_size 2 --max_new_tokens 6 "
                  "--d_batch_size 2",
        "real.people": "--comparisons 100 --words 30 --samples 2 --best_of 2",
        "real.story": ""}


def run_line(line):
    """Runs a line of the Makefile in this process, with the options of TINY after its own."""
    _, name, *args = shlex.split(line.replace(" -m ", " "))
    module = importlib.import_module(name.removesuffix(".py"))
    if name == "real.pretrained":
        return module.convert(*args)
    args += TINY[name].split() + ["--device", "cpu", "--dtype", "float32"]
    if name == "real.people":
        return tyro.cli(module.main, args=args)
    if name == "real.story":
        return module.write_story(tyro.cli(module.Config, args=args))
    return module.train(tyro.cli(module.Config, args=args))


@pytest.mark.parametrize("size, lr_of_ppo", [("cpu", 6e-4), ("gpu", 3e-4)])
def test_make_real(tmp_path, sft_ckpt, monkeypatch, size, lr_of_ppo):
    """All lines of real/Makefile, from published weights to the report, on toy puns."""
    monkeypatch.setattr(people, "MAX_NEW_TOKENS", 16)       # what tiny models have room for
    monkeypatch.setattr(people, "load", lambda *_, **__: SimpleNamespace(records=toy_puns()))
    compared_with, overlap_with = [], people.overlap_with
    for module in (people, story):
        monkeypatch.setattr(module, "overlap_with", lambda texts: compared_with.append(
            set(texts)) or overlap_with(texts))
    pretrained.export(sft_ckpt, str(tmp_path / "init"))
    folder = tmp_path / "real"
    (info, *lines, report_line, story_line), errors = make(
        "-f", "real/Makefile", f"R={folder}", f"SIZE={size}", "SEED=5",
        f"INIT={tmp_path / 'init'}", f"SEMEVAL={tmp_path}", f"EXPUN={tmp_path}",
        "-o", ".venv/ready", "-o", ".venv/ready-real", "real")
    assert not errors
    assert info == f"SIZE={size} SEED=5: into {folder}/"
    assert len(lines) == 11
    for line in lines:
        run_line(line)
    # The judge has not seen what the policies' reward model has, and starts from elsewhere.
    read = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for path in folder.glob("*/config.json")}
    assert len(read) == 8
    assert {name for name, config in read.items() if config["seed"] != 5} == {"gold"}
    assert read["ppo"]["lr"] == read["ppo_weak_kl"]["lr"] == lr_of_ppo
    assert read["reward_model"]["lr"] == read["gold"]["lr"] == 3e-5
    assert read["discriminator"]["lr"] == 2e-5
    assert read["gan"]["lr"] == (3e-5 if size == "cpu" else 1e-5)
    assert read["ppo"]["reward"] == str(folder / "reward_model" / "ckpt.pt")
    assert read["reward_model"]["likelihood"] == read["gold"]["likelihood"] == 0
    assert {n for n, config in read.items() if config.get("lora")} == {"dpo", "ppo", "ppo_weak_kl"}
    # What it starts from, learns from, and is measured on.
    assert {name: (Path(config["init"]).relative_to(folder).parts[0],
                   Path(config["data"]).relative_to(folder / "data").stem,
                   Path(config.get("val_data", "")).stem) for name, config in read.items()} == {
        "sft": ("pretrained", "train", "val"), "discriminator": ("sft", "train", "val"),
        "gan": ("sft", "train", ""), "reward_model": ("sft", "pairs_train", "pairs_val"),
        "gold": ("pretrained", "pairs_gold", "pairs_val"),
        "dpo": ("sft", "pairs_train", "pairs_val"),
        **dict.fromkeys(["ppo", "ppo_weak_kl"], ("sft", "rl_prompts", ""))}
    assert read["ppo_weak_kl"]["kl_coef"] < read["ppo"]["kl_coef"]

    data = folder / "data"
    texts = {part: {r["completion"].strip() for r in read_jsonl(data / f"{part}.jsonl")}
             for part in ("train", "val", "test")}
    gold = {r["chosen"].strip() for r in read_jsonl(data / "pairs_gold.jsonl")}
    for part in texts:                      # the judge and the policies share no text
        assert texts[part] and not texts[part] & gold
    compared = {r["chosen"].strip() for r in read_jsonl(data / "pairs_train.jsonl")}
    assert not compared & (gold | texts["val"] | texts["test"])
    prompts = {name: {r["prompt"] for r in read_jsonl(data / f"{name}_prompts.jsonl")}
               for name in ("rl", "unseen", "trained")}
    assert prompts["trained"] <= prompts["rl"] and not prompts["unseen"] & prompts["rl"]

    for name in ("unseen", "trained"):              # enough to see that the best of 2 are better
        path = data / f"{name}_prompts.jsonl"
        write_jsonl(path, read_jsonl(path)[:4] * 10)
    run_line(report_line)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report["curves"]) == ["ppo", "ppo_weak_kl"]
    assert list(report["judges"]) == ["reward model (proxy)", "judge (gold)"]
    for rows in report["policies"].values():
        assert list(rows) == ["sft", "dpo", "gan", "ppo", "ppo_weak_kl", "best of 2"]
        assert rows["sft"]["kl"] == 0
    unseen = report["policies"]["unseen"]               # of the trained words there is one here
    assert unseen["best of 2"]["proxy"] > unseen["sft"]["proxy"]
    # The SFT model is compared with another draw of itself, so it wins some and loses some.
    assert report["policies"]["unseen"]["sft"]["win rate ±"] > 0
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "not picked" in page and '\n- A pun with the word "' in page and "knead" not in page
    assert (folder / "report.png").stat().st_size > 1000
    samples = read_jsonl(folder / "report_samples.jsonl")
    # Thirty prompts with unseen words, and ten with the trained word.
    assert len(samples) == (30 + 10) * (5 * 2 + 1)
    judges = {name: load_reward_model(folder / stage / "ckpt.pt")
              for name, stage in (("proxy", "reward_model"), ("gold", "gold"))}

    def scores(name, prompts, texts):
        return score_texts(judges[name], tokenizer_of(judges[name].model), prompts, texts, off)

    held_out = people.parts_of(toy_puns(), people.Config().split_seed)["test"]
    for name, row in zip(judges, report["judges"].values(), strict=True):
        assert row == pytest.approx(people.measure_judge(
            judges[name], held_out, read_jsonl(data / "pairs_test.jsonl"), off))
    judged = [[row[name] for row in samples[:9]] for name in ("prompt", "text", "gold")]
    close(scores("gold", *judged[:2]), torch.tensor(judged[2]), atol=1e-3)

    write_jsonl(folder / "blind.jsonl", [{"prompt": "p", "chosen": " a", "rejected": " b"}])
    write_jsonl(folder / "blind.key.jsonl", [{"prompt": "p", "sft": " a", "ppo": " b"}])
    run_line(story_line)
    told = (folder / "story.json").read_text(encoding="utf-8")
    assert not any(json.dumps(text) in told for part in texts.values() for text in part)
    tale = json.loads(told)
    assert tale["policies"].keys() == report["policies"].keys()
    assert {name: len(rows) for name, rows in tale["samples"].items()} == {
        "sft": 60, "dpo": 60, "gan": 60, "ppo": 60, "ppo_weak_kl": 60, "best": 30}
    assert tale["held_out"]["is_pun"] == [int(pun.is_pun) for pun in held_out]
    asked = [PROMPT] * len(held_out), [f" {pun.text}" for pun in held_out]
    for name in judges:
        close(torch.tensor(tale["held_out"][name]), scores(name, *asked), atol=1e-3)
    assert len(tale["blind"].pop("blind")) == 1 and not tale["blind"]
    assert compared_with[0] == compared_with[1] > texts["train"]
    assert not compared_with[0] & (gold | texts["val"] | texts["test"])
    assert tale["people"]["uses the word"] == 1
    assert {name: len(rows) for name, rows in tale["runs"].items()} == {
        name: len(points) for name, points in report["curves"].items()}


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_real_fetches_what_is_not_at_hand():
    """The licenses are accepted by yes alone. Options on the command line take the place of all,
    but for what makes the weak penalty weak."""
    def lines(*arguments):
        found = make("-B", "-o", ".venv/ready", "-f", "real/Makefile", "R=x", *arguments)[0]
        return [line.partition("python ")[2] for line in found]

    published = "-m real.pretrained HuggingFaceTB/SmolLM2-135M-Instruct x/pretrained"
    assert published in [line.strip() for line in lines()]
    both = ["-m real.fetch semeval", "-m real.fetch expun"]
    for accept, option in (("", " "), ("no", " "), ("yes", " --accept_licence")):
        found = [line for line in lines(f"ACCEPT={accept}") if "real.fetch" in line]
        assert found == [line + option for line in both]
    assert [line for line in lines("SEMEVAL=at_hand") if "real.fetch" in line] == [both[1] + " "]
    weak, = (line for line in lines("PPO=--max_steps 9") if "ppo_weak_kl" in line)
    assert weak.endswith("--max_steps 9 --kl_coef 0.005")


def test_no_text_is_compared_with_the_draws_that_it_was_picked_from(tmp_path, monkeypatch):
    """The draws that the best are picked from have gold 5, the row "sft" 1, and PPO 3: the best win
    over the row "sft", which loses to the draws, as PPO does."""
    def draw(path, prompts, judges, config, autocast):
        level = {("sft", 1): 5.0, ("sft", 0): 1.0, ("ppo", 0): 3.0}[path.parent.name, config.seed]
        return [{"prompt": prompt, "text": f"Text {i}.", "gold": level, "score": i, "kl": 0.0}
                for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(people, "draw_samples", draw)
    monkeypatch.setattr(people, "find_policies", lambda folder: [
        folder / name / "ckpt.pt" for name in ("sft", "ppo", "pretrained")])
    for name in ("unseen", "trained"):
        write_jsonl(tmp_path / "data" / f"{name}_prompts.jsonl",
                    [{"prompt": people.word_prompt(word)} for word in ("jam", "sole")])
    config = people.Config(out_dir=str(tmp_path), seed=0, samples=1, best_of=4)
    tables, samples = people.evaluate_policies(config, None, lambda text: 0.0, off)
    for rows in tables.values():
        assert {name: row["win rate"] for name, row in rows.items()} == {
            "sft": 0, "ppo": 0, "best of 4": 1}
    best = [row for row in samples if row["policy"] == "best" and row["words"] == "unseen"]
    assert [row["text"] for row in best] == ["Text 3.", "Text 7."]      # the best of each word's


def test_each_judge_has_a_column_of_its_own(sft_ckpt):
    """score is the proxy's, gold the judge's, and kl is measured to the SFT model."""
    reference = load_model(sft_ckpt)
    reference.wte.weight.data.zero_()           # all tokens are equally likely
    proxy, gold = (RewardModel(load_model(sft_ckpt)).eval() for _ in range(2))
    prompts = [people.word_prompt("sole")] * 3
    rows = people.draw_samples(sft_ckpt, prompts, (reference, proxy, gold),
                               people.Config(**CPU), off)
    texts, tok = [row["text"] for row in rows], tokenizer("puns")
    for column, judge in (("score", proxy), ("gold", gold)):
        scores = score_texts(judge, tok, prompts, texts, off)
        close(torch.tensor([row[column] for row in rows]), scores, atol=1e-4)
    rng = make_rng("cpu", people.Config().seed)
    assert texts == complete(load_model(sft_ckpt), tok, prompts, rng, off, max_new_tokens=64)
    assert all(row["kl"] > 0 for row in rows)


def test_the_gold_curve_by_hand(tmp_path, sft_ckpt):
    """A curve has a point for each step whose samples were kept: means of kl, score, and gold."""
    row = {"step": 1, "prompt": people.word_prompt("sole"), "text": " A fish.", "kl": 1.5,
           "score": 0.5}
    write_jsonl(tmp_path / "samples.jsonl", [row, row | {"kl": 2.5, "text": " No."},
                                             row | {"step": 2}])
    gold = RewardModel(load_model(sft_ckpt)).eval()
    points = people.training_curve(tmp_path / "samples.jsonl", (None, None, gold), off)
    assert [point[:2] for point in points] == [(2.0, 0.5), (1.5, 0.5)]
    scores = score_texts(gold, tokenizer("puns"), [row["prompt"]] * 2, [" A fish.", " No."], off)
    close(torch.tensor([point[2] for point in points]), torch.stack([scores.mean(), scores[0]]))


def test_each_axis_of_the_figure_has_its_own_column(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(people, "Figure", lambda **options: figures.append(
        Figure(**options)) or figures[0])
    people.draw_curves({"ppo": [(1.0, 2.0, 3.0)]}, tmp_path / "report.png")
    assert {axis.get_ylabel().split()[-1]: axis.lines[0].get_xydata().tolist()
            for axis in figures[0].axes} == {"(proxy)": [[1, 2]], "(gold)": [[1, 3]]}

"""
Stage 5, sampling: let any policy write, several of them side by side.

    python sample.py "a banker"                       every policy in runs/, three samples each
    python sample.py "a banker" --n 10 --temperature 0.7 --top_p 0.9
    python sample.py "a banker" --policies runs/sft/ckpt.pt runs/ppo/ckpt.pt
    python sample.py                                  asks for a prompt, again and again
    python sample.py --n 16 --best_to best.jsonl      the best of 16 for each prompt, as a file

Best-of-n distillation: sft.py --init runs/sft/ckpt.pt --data best.jsonl learns from one's own best.

Beside each sample stand the judge's verdict (pun, or ok for on topic), the reward model's score,
and kl = log pi - log pi_sft of the response in nats, where these exist.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from common import InputError, Options, command_line, make_rng, setup, write_jsonl
from data import format_samples, load_prompts, measure, tokenizer_of
from model import LANGUAGE_MODEL, load_model, load_reward_model, read_checkpoint
from puns import world


@dataclass(slots=True)
class Config(Options):
    prompt: tyro.conf.Positional[str] = ""  # a thing of the pun world, or any text; '' asks for it
    policies: tuple[str, ...] = ()          # checkpoints; none is every policy in --runs
    runs: str = "runs"          # kl is measured to its sft, and score is of its reward_model
    n: int = 3                  # samples of each policy
    best_to: str = ""           # JSONL to write: of n samples of the first policy the best by score
    data: str = ""              # with --best_to: JSONL of prompts; '' is the pun world
    temperature: float = 1.0    # 0 takes the most likely token
    top_k: int = 0              # sample among that many most likely tokens; 0 is all
    top_p: float = 1.0          # sample among the most likely tokens that have this mass
    max_new_tokens: int = 32                # longest sample
    READ_IF: ClassVar = [("best_to", [], "data"), ("best_to", [""], "prompt")]


def find_policies(folder):
    """The checkpoints of all language models in a folder of runs, the SFT model first."""
    paths = sorted(Path(folder).glob("*/ckpt.pt"))
    paths = [path for path in paths if read_checkpoint(path)["kind"] == LANGUAGE_MODEL]
    if not paths:
        raise InputError(f"there is no policy in {folder}/; train one with: make, or python sft.py")
    return sorted(paths, key=lambda path: path.parent.name != "sft")


def make_prompt(text):
    """The prompt that the pun world knows for a thing, "a banker" or "banker"; else the text."""
    for prompt in (text, f"About {text}:", f"About a {text}:", f"About an {text}:"):
        if prompt in world("puns_large").by_prompt:
            return prompt
    return text


def write(policies, reference, reward_model, text, config, device, autocast):
    """Prints n samples of every policy, {path: model}, for one prompt."""
    prompts = [make_prompt(text)] * config.n
    for path, policy in policies.items():
        tok, rng = tokenizer_of(policy), make_rng(device, config.seed)
        # Another tokenizer means other ids, which reference and reward model cannot read.
        usable = reference is None or reference.tokenizer_fingerprint == tok.fingerprint
        # The same seed for every policy: what differs is the policy.
        rows = measure(policy, reference if usable else None, tok, prompts, rng, autocast,
                       reward_model if usable else None, config.temperature, config.top_k,
                       config.top_p, config.max_new_tokens)
        print(f"\n{path}\n{format_samples(rows, config.n)}")


def write_best(policy, reward_model, config, device, autocast):
    """Writes one record of prompt and completion for each prompt: the best of n by score."""
    tok = tokenizer_of(policy)
    prompts = [record["prompt"] for record in load_prompts(config, tok)]
    repeated = [prompt for prompt in prompts for _ in range(config.n)]
    rows = measure(policy, None, tok, repeated, make_rng(device, config.seed), autocast,
                   reward_model, config.temperature, config.top_k, config.top_p,
                   config.max_new_tokens)
    records = []
    for i, prompt in enumerate(prompts):
        samples = rows[i * config.n:(i + 1) * config.n]     # neighbors share their prompt
        best = max(samples, key=lambda row: row["score"])
        if best["text"].strip():                            # an empty text teaches nothing
            records.append({"prompt": prompt, "completion": best["text"]})
    write_jsonl(config.best_to, records)
    print(f"{config.best_to}: {len(records)} records")


def main(config):
    """Samples for one prompt, or for all that the user types. Raises InputError."""
    device, autocast = setup(config)
    policies = {}                                                       # path: model
    for path in config.policies or find_policies(config.runs):
        policies[str(path)] = load_model(path, device)
    reference = reward_model = None                                     # both are optional
    reference_path = Path(config.runs, "sft", "ckpt.pt")
    reward_path = Path(config.runs, "reward_model", "ckpt.pt")
    if reference_path.exists():
        reference = load_model(reference_path, device)
    first = next(iter(policies.values()))
    reads = first if config.best_to else reference          # whose texts it scores
    if reads is not None and reward_path.exists():
        reward_model = load_reward_model(reward_path, device, reads)
    if config.best_to:
        if reward_model is None:
            raise InputError(f"--best_to needs {reward_path}, which scores")
        write_best(first, reward_model, config, device, autocast)
        return
    if config.prompt:
        write(policies, reference, reward_model, config.prompt, config, device, autocast)
        return
    print('A prompt, such as "a banker"; an empty line ends.')
    while text := ask():
        try:
            write(policies, reference, reward_model, text, config, device, autocast)
        except InputError as error:
            print(f"error: {error}")
        config.seed += 1                # the same prompt again gets other samples


def ask():
    """A line from the user; '' at the end of the input."""
    try:
        return input("\n> ").strip()                                    # waits for the user
    except EOFError:
        return ""


if __name__ == "__main__":
    command_line(lambda: main(tyro.cli(Config)))

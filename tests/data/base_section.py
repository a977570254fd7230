"""What the tests of data share beside fixtures: base.yaml, where the real dialogues lie, and one small pair."""

from pathlib import Path

from omegaconf import OmegaConf

BASE_FILE = Path(__file__).parents[2] / "conf" / "base.yaml"
BASE = OmegaConf.load(BASE_FILE)
HH = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless-2000.jsonl.gz"


def pair(prompt="Why?", chosen="Because.", rejected="No.", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more

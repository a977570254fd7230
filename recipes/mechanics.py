"""The mechanics of preference losses: loss, implicit rewards, margin and gradient weight for every β.

`python -m recipes.mechanics beta=[0.05,0.1] format=json`; `python -m recipes.mechanics --help` lists the keys.
"""

import difflib
from importlib.resources import files

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from preftune import mechanics


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="mechanics")
def main(cfg):
    given = OmegaConf.to_container(cfg, resolve=True)
    stop_at(mechanics.problems(given))
    print(mechanics.report(given))


def mistakes(arguments: list[str]) -> list[str]:
    """What is wrong with the command line's keys and syntax, one line each; Hydra's own messages run over many."""
    known = set(OmegaConf.load(files("preftune.conf") / "mechanics.yaml")) - {"defaults", "hydra"}
    found = []
    for argument in arguments:
        if argument.lstrip("+~").startswith("hydra"):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            found.append(f"{argument}: not understood; write key=number or key=[number,number], without spaces")
            continue
        key = override.get_key_element().lstrip("+~")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            found.append(f"{key}: no such key; {hint}")
        elif override.is_add() and not override.is_force_add():
            found.append(f"{argument}: the key is there already; write {argument.lstrip('+')}")
        elif override.is_delete():
            found.append(f"{argument}: every key is needed; leave it out to keep its default")
        elif override.is_sweep_override():
            found.append(f"{key}: several numbers want brackets, as in beta=[0.05,0.1]")
        elif isinstance(override.value(), dict):
            found.append(f"{key}: wants a number or a list of numbers, not a mapping")
    return found


def stop_at(problems: list[str]) -> None:
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    stop_at(mistakes(get_args_parser().parse_args().overrides))
    main()

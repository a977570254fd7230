"""The mechanics of preference losses: loss, implicit rewards, margin and gradient weight for every β.

`python -m recipes.mechanics beta=[0.05,0.1] format=json`; `python -m recipes.mechanics --help` lists the keys.
"""

import hydra
from omegaconf import OmegaConf

from preftune.config.command_line import command_line
from preftune.trainers import mechanics


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="mechanics")
def main(cfg):
    given = OmegaConf.to_container(cfg, resolve=True)
    if problems := mechanics.problems(given):
        raise SystemExit("\n".join(problems))
    print(mechanics.report(given))


if __name__ == "__main__":
    command_line("mechanics")
    main()

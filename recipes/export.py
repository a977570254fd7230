"""Export a run as one merged model, as its adapter or for Ollama, with a card, checked to answer as it did.

`python -m recipes.export run=runs/demo output=exported/demo`; `--help` lists the keys.
"""

import hydra

from preftune.config.command_line import command_line
from preftune.config.errors import report_user_errors
from preftune.config.processes import imports


@hydra.main(version_base="1.3", config_path="pkg://preftune.conf", config_name="export")
def main(cfg):
    with imports():
        from preftune.models import hub
        from preftune.pipeline.export import export  # imports torch: only after the checks

    with report_user_errors():
        print(export(cfg.run, cfg.output, cfg.dtype, cfg.base, cfg.to))
        if cfg.push:
            print(f"pushed: {hub.push(cfg.output, cfg.push, cfg.private)}")


if __name__ == "__main__":
    command_line("export")
    main()

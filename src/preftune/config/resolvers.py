"""OmegaConf resolvers that conf/ uses; importing this module registers them."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


def of_job() -> str:
    """`-3` in the fourth job of a multirun, so that each has a run directory of its own; nothing in a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    return f"-{HydraConfig.get().job.num}"


def rate(*, _parent_: DictConfig, _root_: DictConfig) -> float:
    """The learning rate that the loss beside `train` names for an adapter, else 2e-5; a tenth of it without one."""
    loss = (_parent_._get_parent() or _root_).get("loss") or {}
    named = loss.get("rate")
    named = named if isinstance(named, int | float) else 2e-5  # ranges.py refuses any other value but null
    return float(named if _root_.get("lora") else f"{named / 10:.6g}")


OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)  # ${times:2,${.beta}}
OmegaConf.register_new_resolver("rate", rate, replace=True)  # ${rate:}
OmegaConf.register_new_resolver("of_job", of_job, replace=True)

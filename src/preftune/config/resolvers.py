"""OmegaConf resolvers that conf/ uses; importing this module registers them."""

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


def of_job() -> str:
    """`-3` in the fourth job of a multirun, so that each has a run directory of its own; nothing in a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    return f"-{HydraConfig.get().job.num}"


def with_adapter(rate: float, full: float, *, _root_: DictConfig) -> float:
    """`rate` where an adapter is trained, `full` where every weight is (lora=none)."""
    return float(rate if _root_.get("lora") else full)


OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)  # ${times:2,${.beta}}
OmegaConf.register_new_resolver("with_adapter", with_adapter, replace=True)  # ${with_adapter:2e-5,2e-6}
OmegaConf.register_new_resolver("of_job", of_job, replace=True)

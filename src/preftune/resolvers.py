"""OmegaConf resolvers that conf/loss uses; importing this module registers them."""

from omegaconf import OmegaConf

OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)  # ${times:2,${.beta}}

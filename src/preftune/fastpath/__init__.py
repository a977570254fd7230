"""The fast path: TRL's results without its waste, as mixins over TRL's trainers (docs/fastpath.md)."""


def mixins(cls: type) -> tuple[type, ...]:
    """The mixins that speed up `cls`, a trainer class of TRL: its forward, its batches, its reference pass."""
    from trl import DPOTrainer, KTOTrainer, SFTTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    from preftune.fastpath.batches import LengthBatches
    from preftune.fastpath.forward import FastForward
    from preftune.fastpath.kto_batches import KTOBatches
    from preftune.fastpath.odds import FastCPO, FastORPO
    from preftune.fastpath.reference_cache import ReferenceCache

    fast = {
        DPOTrainer: (FastForward, LengthBatches, ReferenceCache),
        KTOTrainer: (FastForward, KTOBatches, ReferenceCache),
        SFTTrainer: (FastForward, LengthBatches),
        ORPOTrainer: (FastORPO, LengthBatches),
        CPOTrainer: (FastCPO, LengthBatches),
    }
    return next((parts for base, parts in fast.items() if issubclass(cls, base)), ())


def trainer_class(cls: type, **settings: object) -> type:
    """The trainer class `cls` of TRL with preftune's fast path over it; `cls` itself where there is none for it.

    `settings` are the mixins' own (bucket_batches, tokens_per_batch, reference_cache, …: conf/base.yaml, `fastpath`);
    they stand on the class because the reference pass runs within TRL's `__init__`.
    """
    parts = mixins(cls)
    return type(cls.__name__, (*parts, cls), {"__module__": __name__, **settings}) if parts else cls
